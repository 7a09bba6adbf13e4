"""How often the semantic cache answers rightly and wrongly, on pairs of questions."""
