"""The site: ``sphinx-build -W -n docs docs/_build``."""

import dataclasses
import functools
import importlib
import inspect
import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

project = "planar_vae_jax"
copyright = "the planar_vae_jax maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "planar_vae_jax"

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4  # for links such as scaling.md#precision

add_module_names = False
autodoc_default_options = {"member-order": "bysource"}
autodoc_mock_imports = ["distrax", "equinox", "flowjax", "numpyro", "paramax"]  # of planar_vae_jax.clients
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say shapes, which types do not
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = True


def sentences(docstring, *_):
    """The lines of a section Returns, which hold no type: napoleon takes all that stands before a colon for one."""
    return [("", "", docstring._dedent(docstring._consume_to_next_section()))]


GoogleDocstring._consume_returns_section = sentences
GoogleDocstring._parse_attribute_docstring = lambda docstring: docstring._consume_to_end()  # of a property too

# Files outside of this folder that are pages of the site; those in docs/ only link to them.
PAGES = {
    "index": "README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "build_notes": "BUILD_NOTES.md",
    "notebook": "notebooks/colab_tpu.ipynb",
}


def read_page(app, docname, source):
    """Puts the content of PAGES in the place of the first line, and turns links to files into links to pages."""
    if docname in PAGES:
        path = Path(app.srcdir).parent / PAGES[docname]
        rest = source[0].partition("\n")[2]
        source[0] = (cells(path) if path.suffix == ".ipynb" else path.read_text()) + rest
    source[0] = source[0].replace("](docs/", "](")
    for page, file in PAGES.items():
        source[0] = re.sub(rf"\]\((\.\./)?{re.escape(file)}(#|\))", rf"]({page}.md\2", source[0])


def cells(path):
    """The cells of a notebook and their outputs, as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        language = "text" if re.search(r"^\s*!", text, re.MULTILINE) else "python"  # a command of the shell
        parts.append(text if cell["cell_type"] == "markdown" else f"```{language}\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                url = f"data:image/png;base64,{data['image/png'].strip()}"
                parts.append(f'<img src="{url}" alt="picture that the cell above draws">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)


def describe_field(app, what, name, obj, options, lines):
    """Describes a field by the comment at its declaration, ``b: Array  # [..., K]``, and a flag by its help."""
    if lines and not lines[0].startswith("Alias for field number"):  # which every NamedTuple has
        return
    lines.clear()
    top, *path, field = name.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(top))
    if what != "attribute" or not inspect.isclass(owner):
        return
    comment = re.search(rf"^    {field}: .*  # (?!type:)(.*)$", inspect.getsource(owner), re.MULTILINE)
    lines += [comment[1]] if comment else []
    if dataclasses.is_dataclass(owner):
        lines += [one.metadata["help"] for one in dataclasses.fields(owner) if one.name == field and one.metadata]


def sign(app, what, name, obj, options, signature, annotation):
    """Gives a class the signature that it has, where a base class that is mocked hides it."""
    if what == "class" and signature == "(*args, **kwargs)":
        own = inspect.signature(obj.__init__)
        own = own.replace(parameters=list(own.parameters.values())[1:])
        return stringify_signature(own, show_annotation=False, show_return_annotation=False), annotation
    return None


def public_place(env, name):
    """The full name and the page of what docstrings and pages call ``flows.planar.init_planar`` or ``init_planar``."""
    path = name.split(".")
    for start in range(len(path)):
        found = env.get_domain("py").find_obj(env, "", "", ".".join(path[start:]), None, searchmode=1)
        members = ("method", "property", "attribute") if start == len(path) - 1 else ()
        places = [(full, place) for full, place in found if not place.aliased and place.objtype not in members]
        if len(places) == 1:
            return places[0]
    return None


def find_public_name(app, env, node, contnode):
    """Resolves a role that names an object by its module, where the reference has it by its package."""
    if found := public_place(env, node["reftarget"]):
        full, place = found
        return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, contnode, full)
    return None


def link_names(app, doctree, docname):
    """Makes a link of a name in code style, such as ``planar_flow``."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        if not re.fullmatch(r"\w*[A-Z_]\w*", name) or isinstance(literal.parent, nodes.reference):
            continue
        full, place = public_place(app.env, name) or ("", None)
        if place and place.objtype in ("class", "function", "exception", "data"):
            link = make_refnode(app.builder, docname, place.docname, place.node_id, literal.deepcopy(), full)
            literal.replace_self(link)


def setup(app):
    app.connect("source-read", read_page)
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-process-docstring", describe_field)
    app.connect("missing-reference", find_public_name)
    app.connect("doctree-resolved", link_names)
