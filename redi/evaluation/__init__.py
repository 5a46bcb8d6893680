"""Answers, their verdicts, and what a model's score is worth."""
