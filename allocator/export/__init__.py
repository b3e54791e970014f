"""From a decision to a checkpoint on disk: written whole, re-opened, compared."""
