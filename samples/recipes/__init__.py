"""Recipes that train models worth exporting: early exits, layer dropout, draft heads; one command each."""
