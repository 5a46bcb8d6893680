"""Answers and their verdicts, judged in processes that can be killed."""
