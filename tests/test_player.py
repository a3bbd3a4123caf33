"""The page that plays a moving picture: what it holds, that it holds all, and what its script makes of that."""

import base64
import copy
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from kopt.plot import player

IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))  # a page keeps the bytes and does not look at them
EVIL = '</script><script>alert("1")</script><!-- & {{image}} \N{LINE SEPARATOR} \N{SNOWMAN}'
PARTS = {"title": "Beale", "caption": "Two dimensions.", "label": "Adam", "end": "left", "note": "0.1"}


def scene(points=((0.0, 1.0), (2.0, 3.0)), losses=(2.0, 0.5), runs=1, **changed):
    """Axes that are 200 and 100 pixels long and reach from 0 to 4 and from 1 to 3; what is `changed` are its texts."""
    texts = PARTS | changed
    area = {"image": IMAGE, "width": 220, "height": 130, "left": 10, "top": 20, "right": 210, "bottom": 120}
    run = {"color": "#0072B2", "points": points, "losses": losses} | {n: texts[n] for n in ("label", "note", "end")}
    return {
        "title": texts["title"],
        "caption": texts["caption"],
        "map": area | {"x": [0, 4], "y": [1, 3]},
        "runs": [copy.deepcopy(run) for _ in range(runs)],
        "loss": {"log": True, "low": 0.01, "high": 10.0, "label": "loss"},
    }


class Read(html.parser.HTMLParser):
    """The elements of a page, with their attributes and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in ("meta", "img", "input"):
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1][2].append(data)

    def all(self, tag):
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]

    def data(self):
        (text,) = [text for attributes, text in self.all("script") if attributes.get("type") == "application/json"]
        return json.loads(text, parse_constant=pytest.fail)


def test_a_page_holds_the_scene():
    shown = scene()
    read = Read(player.page(shown))
    assert not read.open
    assert [text for _, text in read.all("title") + read.all("h1")] == ["Beale", "Beale"]
    (image, _), data = read.all("img")[0], read.data()
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == IMAGE
    assert (image["width"], image["height"]) == ("220", "130")
    shown["runs"][0] |= {"points": [[0, 1], [2, 3]], "losses": [2.0, 0.5]}
    area = {name: value for name, value in shown["map"].items() if name not in ("image", "width", "height")}
    assert data == {"map": area, "runs": shown["runs"], "loss": shown["loss"]}


def test_numbers_have_the_digits_that_are_seen():
    points = np.random.default_rng(0).uniform([0, 1], [4, 3], (50, 2))
    losses = np.geomspace(1e-9, 1e9, 50)
    (run,) = Read(player.page(scene(points, losses))).data()["runs"]
    np.testing.assert_allclose(run["points"], points, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run["losses"], losses, rtol=5e-4)
    assert max(len(repr(number)) for point in run["points"] for number in point) <= len("1.2345")


def test_what_is_not_finite_is_null():
    points, losses = [[0, 1], [np.nan, 2], [3, -np.inf], [1e300, 2]], [np.inf, -np.inf, np.nan, 1e300]
    (run,) = Read(player.page(scene(points, losses))).data()["runs"]
    assert run["points"] == [[0, 1], None, None, [1e300, 2]]
    assert run["losses"] == [None, None, None, 1e300]


def test_nothing_is_loaded():
    page = player.page(scene())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert not [a for tag in ("link", "iframe", "object", "embed") for a in Read(page).all(tag)]
    sources = {name: a[name] for _, a, _ in Read(page).elements for name in ("src", "href", "srcset") if name in a}
    assert list(sources) == ["src"]
    (policy,) = [a["content"] for a, _ in Read(page).all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")


@pytest.mark.parametrize("name", PARTS)
def test_texts_stay_texts(name):
    plain, read = Read(player.page(scene())), Read(player.page(scene(**{name: EVIL})))
    assert [tag for tag, *_ in read.elements] == [tag for tag, *_ in plain.elements]
    if name in ("title", "caption"):
        where = {"title": read.all("h1")[0], "caption": read.all("p")[-1]}
        assert where[name][1] == EVIL
    else:
        assert read.data()["runs"][0][name] == EVIL


def test_a_frame_holds_the_page():
    shown = scene(title=EVIL)
    ((tag, attributes, _),) = Read(player.frame(shown)).elements
    assert tag == "iframe"
    assert attributes["srcdoc"] == player.page(shown)
    assert attributes["title"] == EVIL
    assert re.fullmatch(r"width: 100%; .*height: \d+px; border: 0", attributes["style"])


def test_equal_scenes_make_equal_pages():
    assert player.page(scene()) == player.page(copy.deepcopy(scene()))


def test_pages_are_small():
    empty = len(player.page(scene(runs=0))) - len(base64.b64encode(IMAGE))
    assert empty < 20_000
    rng = np.random.default_rng(0)
    large = scene(rng.uniform(1, 3, (241, 2)), rng.uniform(0, 1, 241), runs=6)
    large["map"]["image"] = rng.bytes(80_000)
    assert len(player.page(large)) < 200_000


# What the script needs of a browser: `by` finds elements by id, or all of a class.
BROWSER = """
const nodes = [], by = name => nodes.filter(node => node.id === name || node.attributes.class === name);
class Node {
  constructor(id) {
    Object.assign(this, { id, attributes: {}, style: {}, on: new Set(), textContent: "", value: "1" });
    this.classList = { toggle: (name, is) => this.on[is ? "add" : "delete"](name) };
    nodes.push(this);
  }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  getAttribute(name) { return this.attributes[name]; }
  appendChild(child) { return child; }
  replaceChildren() {}
  querySelector() { return new Node(); }
  matches() { return false; }
}
let frame = null;
const performance = { now: () => 0 }, addEventListener = () => {}, requestAnimationFrame = next => { frame = next; };
const matchMedia = () => ({ matches: STILL });
const document = {
  getElementById: id => by(id)[0] || new Node(id),
  createElement: () => new Node(), createElementNS: () => new Node(),
};
by("scene")[0] || (new Node("scene").textContent = SCENE);
const key = name => document.onkeydown({ key: name, target: new Node(), preventDefault() {} });
const seen = () => ({
  step: by("slider")[0].value, loss: by("row").slice(-RUNS).map(row => row.loss.textContent),
  lines: by("line").slice(0, RUNS).map(node => node.attributes.d),
  dots: by("dot").slice(0, RUNS).map(node => [node.attributes.d, ...node.on]),
  plays: by("play")[0].attributes["aria-label"] === "Pause",
});
"""


def play(shown, does: str, still=True):
    """What the script shows after each of the things that are done, in node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("the script is run by node, which is not here")
    read = Read(player.page(shown))
    given = {"SCENE": json.dumps(read.data()), "STILL": still, "RUNS": len(shown["runs"])}
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in given.items())
    script = f"{given}{BROWSER}{read.all('script')[-1][1]}\nconsole.log(JSON.stringify([{does}]));"
    done = subprocess.run([node, "-"], input=script, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_script_draws_the_steps():
    points = [[0, 1], [2, 2], [4, 4], [np.nan, 0], [4, 3]]  # the third is beyond the axes, which y leaves at 3
    shown = scene(points, [2.0, 0.04567, np.nan, 1e-5, 0.0])
    shown["runs"][0]["end"] = ""
    keys = (
        '(key("Home"), seen()), (key("ArrowRight"), seen()), (key("ArrowRight"), seen()), (key("ArrowRight"), seen()), '
    )
    first, second, third, fourth, last = play(shown, keys + '(key("End"), seen())')
    assert [one["step"] for one in (first, second, third, fourth, last)] == [0, 1, 2, 3, 4]
    assert first["lines"] == [""]
    assert second["lines"] == ["M10.00 120.00L110.00 70.00"]
    assert third["lines"] == fourth["lines"] == last["lines"] == ["M10.00 120.00L110.00 70.00L210.00 -30.00"]
    dots = [one["dots"][0] for one in (first, second, third, fourth, last)]
    border = ["M160.00 20.00h0", "beyond"]
    assert dots == [["M10.00 120.00h0"], ["M110.00 70.00h0"], border, border, ["M210.00 20.00h0"]]
    assert [one["loss"] for one in (first, second, third, last)] == [["2"], ["0.0457"], ["not finite"], ["0"]]


def test_the_lowest_loss_is_on_the_axis():
    shown = scene(losses=(1.0, 0.0123412))
    shown["loss"]["low"] = 0.0123412
    (end,) = play(shown, '(key("End"), by("dot").slice(1).map(node => node.on.has("beyond")))')
    assert end == [False]


def test_the_script_draws_what_is_far_away():
    shown = scene([[2, 2], [1e300, 1e299], [2, 2], [2, -1e20]], [1.0, 1e300, 0.0, 1.0])  # up by 1 in 10, back, and down
    start, far, end = play(shown, '(key("Home"), seen()), (key("ArrowRight"), seen()), (key("End"), seen())')
    assert far["lines"] == ["M110.00 70.00L410.00 40.00"]
    assert far["dots"] == [["M210.00 60.00h0", "beyond"]]
    assert end["lines"] == ["M110.00 70.00L410.00 40.00L110.00 70.00L110.00 220.00"]
    assert end["dots"] == [["M110.00 120.00h0", "beyond"]]
    assert [one["loss"] for one in (start, far, end)] == [["1"], ["1.0e+300"], ["left"]]


def test_the_script_plays_unless_motion_is_to_be_reduced():
    shown = scene(np.full((61, 2), 2.0), np.ones(61))
    (still,) = play(shown, "seen()")
    assert (still["step"], still["plays"]) == (60, False)
    time = "[0, 50, 100, 150, 200].forEach(now => frame(now))"
    start, later, stopped = play(shown, f'seen(), ({time}, seen()), (key(" "), seen())', still=False)
    assert (start["step"], start["plays"]) == (0, True)
    assert (later["step"], later["plays"]) == (2, True)  # of 60 in 5 seconds, after 0.2
    assert (stopped["step"], stopped["plays"]) == (2, False)


def test_the_legend_switches_runs():
    shown = scene(runs=2)
    press = 'by("row").at(-2).onclick()'
    off = 'by("line").slice(0, 2).map(node => node.on.has("off"))'
    assert play(shown, f"{off}, ({press}, {off}), ({press}, {off})") == [[False, False], [True, False], [False, False]]
