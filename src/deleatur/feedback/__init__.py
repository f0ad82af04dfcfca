"""Answers of people → validated, append-only tables → agreement, votes and pairs. Knows pandas, never files of ours."""
