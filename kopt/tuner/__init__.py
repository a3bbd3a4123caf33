"""Learning-rate search on KerasTuner."""
