"""What a client says where its library is not installed."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(("client", "name"), [("numpyro", "NumPyro"), ("flowjax", "FlowJAX"), ("distrax", "Distrax")])
def test_an_error_names_the_extra_to_install(client, name, monkeypatch):
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.setitem(sys.modules, f"{client}.bijections", None)
    monkeypatch.delitem(sys.modules, f"planar_vae_jax.clients.{client}", raising=False)
    message = rf"planar_vae_jax.clients.{client} needs {name}: pip install 'planar_vae_jax\[{client}\]'"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"planar_vae_jax.clients.{client}")
