"""When a run does what: the examples and the learning rate of each step."""

import math

import numpy as np

from redi.config import TrainConfig


class Schedule:
    """Which examples each step trains on, and its learning rate: functions of the step alone."""

    def __init__(self, num_examples: int, config: TrainConfig):
        self.config, self.num_examples = config, num_examples
        self.steps_per_epoch = math.ceil(num_examples / config.train_batch_size)
        wanted = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else wanted
        self.warmup_steps = math.ceil(config.warmup_ratio * self.total_steps)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)  # the last epoch asked for

    def examples(self, step: int) -> list[int]:
        """The examples of 0-based `step`; an epoch's last step holds what is left over."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            generator = np.random.default_rng([self.config.seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(self.num_examples)
        size = self.config.train_batch_size
        return self._order[position * size : (position + 1) * size].tolist()

    def learning_rate(self, step: int) -> float:
        """Warm-up to the peak, then decay towards 0. As transformers' schedules of the same names,
        except that no step is spent at a rate of 0."""
        peak, kind = self.config.learning_rate, self.config.lr_scheduler_type
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if kind == "constant":
            return peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return peak * (
            1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        )
