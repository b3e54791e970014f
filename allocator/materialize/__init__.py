"""From an allocation to a checkpoint on disk: written whole, with a manifest, re-opened and compared."""
