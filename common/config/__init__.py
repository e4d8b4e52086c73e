"""One configuration for every component: the schema, the presets, and how preset, file and overrides are merged."""
