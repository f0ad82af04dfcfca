"""The evidence for people: HTML report, model card, bill of materials, curves."""
