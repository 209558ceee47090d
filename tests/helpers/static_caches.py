"""How a static cache is given to models of transformers, whose argument for it has had two names."""

import inspect


def given(model, cache):
    """Return the keyword argument by which a model takes a cache."""
    taken = inspect.signature(type(model).forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache}


def returned(output):
    """Return the cache that a model gives back."""
    return output.cache if hasattr(output, "cache") else output.past_key_values
