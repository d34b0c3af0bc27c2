"""Studies: variants of a recipe, trained as ordinary runs with several seeds, and the page that compares them."""
