"""From a loaded model to a tier that is ready: what is stored, at which rates, under which identity."""
