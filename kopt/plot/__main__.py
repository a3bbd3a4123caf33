"""`python -m kopt.plot`: the pictures that need no model, from the command line."""

import argparse
import glob
import os
import sys

from kopt import landscape, plot
from kopt.optimizers.named import RULES, SOLVERS
from kopt.plot import expressions
from kopt.plot.picture import STILL

EXAMPLES = """
examples:
  python -m kopt.plot trajectories --optimizers sgd,momentum,nesterov,adagrad,rmsprop,adam --surface beale -o beale.gif
  python -m kopt.plot trajectories --optimizers sgd=0.01,adam=0.1,lbfgs,keras.Lion --surface saddle -o saddle.html
  python -m kopt.plot schedule "WarmUp(steps=50) >> CosineDecay(initial=0.1)" --steps 1000 -o rates.png
  python -m kopt.plot history adam=runs/adam/*.csv sgd=runs/sgd/*.csv --metrics loss,accuracy -o history.png
"""
STILLS = ", ".join(STILL)


def words(text: str) -> list[str]:
    """What lies between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parsed(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m kopt.plot",
        description="Draw what optimizers do, what schedules look like, and what trainings came to.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, does, draw):
        one = commands.add_parser(name, help=does, description=does[0].upper() + does[1:] + ".")
        one.set_defaults(draw=draw, parser=one)
        return one.add_argument

    add = command("trajectories", "optimizers on a surface of two weights, still or moving", trajectories)
    named = f"{', '.join([*RULES, *SOLVERS])}, or keras.Lion and the like"
    names = f"names, with a learning rate or without: {named}; without, the rate is the best of 19 tries"
    add("--optimizers", type=words, default=["sgd", "momentum", "rmsprop", "adam"], metavar="A,B=RATE,...", help=names)
    add("--surface", default="beale", help=f"one of {', '.join(landscape.SURFACES)} (default: beale)")
    add("--steps", type=int, help="how many; by default what tells something on the surface")
    add("--start", type=float, nargs=2, metavar=("X", "Y"), help="where to begin")
    add("--view", type=float, nargs=4, metavar=("LEFT", "RIGHT", "BOTTOM", "TOP"), help="what to show")
    add("--tune", type=int, metavar="N", help="find every rate in N tries, also those that are given")
    _output(add, f"{STILLS}, .gif or .html", True)

    add = command("schedule", "learning rates over the steps of a training", schedule)
    written = "as in Python, of kopt.schedules: 'CosineDecay(initial=0.1)', 'WarmUp(steps=50) >> ...'"
    add("schedules", nargs="+", metavar="EXPRESSION", help=written)
    add("--steps", type=int, default=1000, help="how many to draw (default: 1000)")
    add("--steps-per-epoch", type=int, metavar="N", help="for schedules that count epochs")
    add("--base", type=float, default=1.0, help="what factors multiply (default: 1)")
    _output(add, f"{STILLS}; without it, a line of text for each", False)

    add = command("history", "metrics of trainings, with a band over runs of one name", history)
    files = "files that keras.callbacks.CSVLogger has written; those of one name are one band"
    add("runs", nargs="+", metavar="[NAME=]FILE", help=files)
    add("--metrics", type=words, default=["loss"], metavar="A,B,...", help="a panel each (default: loss)")
    _output(add, STILLS, True)
    return parser.parse_args(arguments)


def _output(add, endings, required) -> None:
    add("-o", "--output", nargs="+", required=required, metavar="FILE", help=f"to write: {endings}")


def trajectories(given):
    view = given.view and (given.view[:2], given.view[2:])
    asked = {"steps": given.steps, "start": given.start, "view": view, "tune": given.tune}
    picture = plot.trajectories(given.optimizers, given.surface, **asked, save=given.output)
    print(picture.record)


def schedule(given):
    shown = [expressions.evaluated(text) for text in given.schedules]
    steps = {"steps": given.steps, "steps_per_epoch": given.steps_per_epoch, "base": given.base}
    if given.output:
        plot.schedule(*shown, **steps, save=given.output)
        return
    for text, one in zip(given.schedules, shown, strict=True):
        print(text, one.sparkline(**steps), sep="\n")


def history(given):
    runs: dict[str, list] = {}
    for run in given.runs:
        name, file = run.split("=", 1) if "=" in run and not glob.glob(run) else ("", run)
        for one in expressions.files(file):
            runs.setdefault(name or os.path.splitext(one)[0], []).append(one)
    plot.history(runs, metrics=given.metrics, save=given.output)


def main(arguments=None) -> None:
    given = parsed(arguments)
    try:
        given.draw(given)
    except (ValueError, ImportError, OSError) as error:
        given.parser.exit(2, f"{given.parser.prog}: {error}\n")
    except KeyboardInterrupt:
        given.parser.exit(130, "interrupted\n")
    for file in given.output or ():
        print(f"{file}: {max(1, os.path.getsize(os.path.expanduser(file)) // 1024)} KB")


if __name__ == "__main__":
    main(sys.argv[1:])
