"""A pytest plugin: a property that fails is not made smaller; that it failed is all that is asked here."""

from hypothesis import Phase, settings

settings.register_profile("first failure", phases=[Phase.explicit, Phase.generate])
settings.load_profile("first failure")
