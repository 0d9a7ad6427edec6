"""Checks shapes and dtypes in annotations at run time, which the package leaves to type checkers."""

import typing

import beartype
import jax
import jaxtyping


def checked(function):
    """The function, its arguments and result checked by its annotations; of a compiled function, what is compiled."""
    function = getattr(function, "__wrapped__", function)
    owner = getattr(function, "__func__", function)
    owner.__annotations__ = hints(function)
    return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


def hints(annotated):
    """The annotations of a function or class; the names in them are its module's and jaxtyping's."""
    return typing.get_type_hints(annotated, localns=vars(jaxtyping) | {"Array": jax.Array})
