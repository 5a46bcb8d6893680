"""What the paper published (arXiv 2505.24850v1), to stand beside what was measured here.

pass@1 over 16 samples and its SEM, in percent, with rllm's grader, on the paper's hardware and
templates; pass@16 from its Tables 3 and 4. None where the paper gives no figure.
"""

from dataclasses import dataclass

SETS = ("math500", "aime24", "amc23", "minerva", "olympiadbench")


@dataclass(frozen=True)
class Published:
    model: str
    source: str
    pass_at_1: tuple[float, ...]  # of SETS
    sem: tuple[float, ...] | None
    average: tuple[float, float | None]  # and its SEM
    pass_at_16: tuple[float, ...] | None = None


PUBLISHED = (
    Published(
        "Qwen2.5-Math-1.5B",
        "its README, from EMPO",
        (52.2, 10.0, 42.5, 10.7, 25.2),
        None,
        (28.1, None),
    ),
    Published(
        "Qwen2.5-Math-1.5B-Instruct",
        "Table 1",
        (75.8, 10.0, 60.0, 29.4, 38.1),
        None,
        (42.7, None),
    ),
    Published(
        "DeepSeek-R1-Distill-Qwen-1.5B",
        "Table 1",
        (83.2, 28.3, 62.1, 26.0, 43.1),
        (0.2, 1.0, 0.8, 0.4, 0.3),
        (48.6, 0.3),
        (95.6, 63.3, 92.8, 56.6, 65.8),
    ),
    Published(
        "Qwen-SFT-1.5B-5ep",
        "Table 1",
        (80.4, 21.9, 57.5, 27.5, 41.5),
        (0.3, 1.1, 0.6, 0.4, 0.3),
        (45.8, 0.3),
        (95.6, 56.7, 86.7, 56.3, 64.3),
    ),
    Published(
        "Qwen-REDI-1.5B",
        "Table 1",
        (83.1, 28.1, 62.4, 28.8, 45.2),
        (0.3, 1.1, 0.6, 0.3, 0.2),
        (49.5, 0.3),
        (95.0, 66.7, 90.4, 57.0, 65.8),
    ),
    Published(
        "SFT-3ep",
        "Table 2",
        (76.7, 18.1, 52.8, 24.6, 37.5),
        (0.3, 1.1, 0.6, 0.5, 0.3),
        (41.9, 0.3),
        (94.6, 53.3, 86.7, 57.7, 63.1),
    ),
    Published(
        "DPO beta 0.001, lr 2e-7",
        "Table 2",
        (81.3, 24.6, 58.5, 28.7, 43.1),
        (0.2, 1.7, 0.6, 0.4, 0.3),
        (47.2, 0.4),
        (94.6, 63.3, 86.7, 58.8, 64.7),
    ),
    Published(
        "SimPO beta 2, gamma 1, lr 5e-7",
        "Table 2",
        (81.1, 24.8, 58.8, 29.1, 42.2),
        (0.3, 1.9, 0.6, 0.2, 0.3),
        (47.2, 0.4),
        (94.8, 60.0, 89.2, 58.5, 63.3),
    ),
    Published(
        "REDI alpha 1.0, lr 2e-7",
        "Table 2",
        (81.7, 25.8, 59.5, 29.3, 42.1),
        (0.2, 1.3, 1.1, 0.4, 0.2),
        (47.7, 0.4),
        (95.0, 63.3, 90.4, 58.8, 62.5),
    ),
    Published(
        "REDI alpha 0.8, lr 1e-6",
        "Table 2",
        (81.7, 27.3, 58.8, 30.4, 43.4),
        (0.2, 1.4, 0.8, 0.5, 0.3),
        (48.3, 0.3),
        (95.0, 66.7, 81.9, 59.9, 63.9),
    ),
)
