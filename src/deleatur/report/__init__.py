"""HTML report, contact sheet, model card, bill of materials and training curves of an evaluation."""
