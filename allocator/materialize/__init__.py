"""From an allocation to a checkpoint on disk: written whole, re-opened, compared."""
