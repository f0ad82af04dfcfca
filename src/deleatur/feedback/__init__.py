"""Answers of raters → validated, append-only tables → agreement, votes and pairs. Depends on pandas, reads no files."""
