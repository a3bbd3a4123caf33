"""The axes that a picture is drawn in."""


def axes(ax, size=(7, 3.5)):
    """Those that are given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("Pictures need matplotlib: `pip install kopt[plot]`") from None
    return plt.subplots(figsize=size, layout="constrained")[1]
