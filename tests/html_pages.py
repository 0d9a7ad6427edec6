"""Reads a page with Python's parser of HTML, and opens pages in headless Chromium where there is one."""

import base64
import dataclasses
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

from planar_vae_jax.statistics import with_error

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
)
VOID = {"meta", "link", "img"}  # elements without an end
ALONE = {"line", "circle", "path"}  # of SVG, written <path/>


class Page(HTMLParser):
    """What a page holds. Reading it asserts that each element ends where it should, and that no id occurs twice."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.images, self.links = set(), set(), [], []
        self.declaration, self.words, self.rows = None, [], []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []
        assert self.declaration == "DOCTYPE html"
        self.text = " ".join(" ".join(self.words).split())

    def handle_decl(self, declaration):
        self.declaration = declaration

    def handle_starttag(self, tag, attributes):
        assert tag not in ALONE, f"<{tag}> without its end"
        self._element(tag, attributes)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ALONE, f"<{tag}/>"
        self._element(tag, attributes)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)
        if self._open[-1:] in (["td"], ["th"]):
            self.rows[-1].append(data)

    def _element(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), "an attribute occurs twice"
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        if tag == "img":
            self.images.append(found)
        if tag == "a":
            self.links.append(found["href"])
        for name in ("src", "href", "srcset", "action"):
            assert re.match(r"(data:|#|[^:]*$)", found.get(name, "")), f"not on the page: {found[name]}"

    def png(self, number):
        """The bytes of a picture."""
        kind, data = self.images[number]["src"].split(",")
        assert kind == "data:image/png;base64"
        return base64.b64decode(data)


def missing(page, figures, errors=None):
    """The numbers of (a part of) a summary that are not on the page, each with its error if it has one."""
    found = []
    for name, value in figures.items():
        if name.endswith("_se"):
            continue
        if isinstance(value, dict):
            found += missing(page, value, figures.get(f"{name}_se", {}))
        for one in value if isinstance(value, list) else [value]:
            error = figures.get(f"{name}_se", (errors or {}).get(name))
            if isinstance(one, float) and with_error(one, error) not in page.text:
                found.append((name, one, error))
    return found


@dataclasses.dataclass
class Shown:
    """How wide a page is in a window of some width, and the colour behind it."""

    window: int
    room: int  # the window without its scroll bar
    width: int  # of the page
    background: str


def shown(page, folder, *, dark, widths):
    """Opens a page in windows (frames) of these widths: how it is shown in each, and what Chromium's console says.

    After the frames of the page comes one with a box that is 100 pixels too wide, and the console begins with "probe":
    both show that the looking works.
    """
    frames = [(width, f'src="{page.as_uri()}"') for width in widths]
    frames.append((widths[0], f'srcdoc="&lt;div style=width:{widths[0] + 100}px&gt;-&lt;/div&gt;"'))
    written = "".join(f'<iframe width="{width}" height="600" style="border:0" {of}></iframe>' for width, of in frames)
    looker = folder / "looker.html"
    looker.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">{written}<script>
console.error("probe");
onload = () => {{ for (const frame of document.querySelectorAll("iframe")) {{
  const root = frame.contentDocument.documentElement, line = document.createElement("p");
  const colour = frame.contentWindow.getComputedStyle(frame.contentDocument.body).backgroundColor;
  line.textContent = ["FRAME", frame.width, root.clientWidth, root.scrollWidth, colour].join("|");
  document.body.append(line); }} }};
</script>"""
    )
    flags = [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *FLAGS, *flags, looker.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.findall(r"FRAME\|(\d+)\|(\d+)\|(\d+)\|([^<]+)<", html.unescape(run.stdout))
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    return [Shown(*map(int, sizes), colour) for *sizes, colour in found], console
