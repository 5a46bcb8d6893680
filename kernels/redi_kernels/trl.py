"""REDI inside TRL (1.16 or later): a DPOTrainer with REDI's loss and without a reference model."""

import copy
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer

from redi_kernels.hf import patch
from redi_kernels.losses import redi_loss

# Settings of DPOConfig that this loss has no use for, and the values at which they do nothing.
UNUSED = {
    "loss_type": ["sigmoid"],
    "beta": 0.1,
    "ld_alpha": None,
    "label_smoothing": 0.0,
    "use_weighting": False,
    "sync_ref_model": False,
}


class RediTrainer(DPOTrainer):
    """`DPOTrainer` on the same datasets and DPOConfig; `alpha` as in `redi_loss`.

    Pairs are counted over the whole optimizer step, all micro-batches and ranks. Logged
    `rewards/*` are log-probs per token, `logps/*` their sums, both means over sequences.
    Raises ValueError for settings of DPO that would do nothing here.
    """

    loss_is_scaled_for_ga = True  # by the counts: Trainer must not divide by the steps again

    def __init__(self, model: Any, args: DPOConfig, *, alpha: float = 0.8, **kwargs: Any) -> None:
        for name, default in UNUSED.items():
            if getattr(args, name) != default:
                raise ValueError(f"{name}={getattr(args, name)}: REDI's loss has no use for it")
        if kwargs.get("ref_model") is not None:
            raise ValueError("ref_model: REDI has no reference model")
        args = copy.copy(args)
        args.precompute_ref_log_probs = True  # or TRL would load a second model
        super().__init__(model, args=args, **kwargs)
        self.precompute_ref_logps = False
        if self.aux_loss_enabled:
            raise ValueError(
                "experts' balancing loss: set router_aux_loss_coef=0.0, it is left out"
            )
        self.alpha = alpha
        patch(self.model)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        pairs = sum(len(batch["input_ids"]) // 2 for batch in batch_samples)
        return self.accelerator.gather(torch.tensor([pairs], device=device)).sum()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        mask_ST = inputs.pop("completion_mask")
        ids_ST = inputs["input_ids"]
        S, T = ids_ST.shape  # TRL puts all the chosen ones first
        y_ST = ids_ST.masked_fill(mask_ST == 0, -100)[:, 1:]
        cu_seqlens = torch.arange(S + 1, device=ids_ST.device) * (T - 1)
        is_chosen_S = torch.arange(S, device=ids_ST.device) < S // 2
        counts = {"num_chosen": num_items_in_batch, "num_rejected": num_items_in_batch}

        def loss_fn(x_STH: torch.Tensor, head: Any) -> Any:
            x_TH = x_STH[:, -T:-1].flatten(0, 1)  # -T: prompt tuning puts tokens in front
            y_T = y_ST.flatten()
            return head(redi_loss, x_TH, y_T, cu_seqlens, is_chosen_S, alpha=self.alpha, **counts)

        out = model(**inputs, loss_fn=loss_fn)
        self._note("train" if model.training else "eval", out, inputs["attention_mask"].sum())
        loss = out.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP and FSDP will average over them
        return (loss, out) if return_outputs else loss

    def _note(self, mode: str, out: Any, num_tokens: torch.Tensor) -> None:
        """Metrics of one micro-batch, in TRL's names; one wait for the device."""
        chosen, rejected = (out.logps_S / out.lengths_S.clamp(min=1)).chunk(2)
        rows = torch.stack([chosen, rejected, *out.logps_S.chunk(2), (chosen > rejected).float()])
        means = self.accelerator.gather(rows.T.contiguous()).mean(0).tolist()
        names = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
        metrics = dict(zip((*names, "rewards/accuracies"), means, strict=True))
        metrics["rewards/margins"] = means[0] - means[1]
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(num_tokens).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
