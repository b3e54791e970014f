"""From a model to a verified checkpoint in one call: every stage of the road, in order."""
