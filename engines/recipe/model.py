"""The network: FunASR's Paraformer at 6 + 2 blocks, with the same CIF in one matrix product for training."""

from __future__ import annotations

from typing import Any

import funasr.models.paraformer.cif_predictor
import funasr.models.paraformer.decoder
import funasr.models.sanm.encoder  # noqa: F401  (each import registers its classes with FunASR)
import torch
from funasr.models.paraformer.model import Paraformer
from phrases import TOKENS

EOS = 2
WIDTH = 176
EMPTY_COUNT = 1.5
"""Tokens where the text is empty, each of them `</s>`: without any, the decoder of a whole graph fails."""
EMPTY_WEIGHT = 4.0
"""Of the count where the text is empty: few utterances are without one, and short beside the others."""


def configuration(ctc_weight: float = 0.0) -> dict[str, Any]:
    """FunASR's configuration of the network; CTC is there while training only."""
    dropout = {"dropout_rate": 0.1, "positional_dropout_rate": 0.0}
    return {
        "encoder": "SANMEncoder",
        "encoder_conf": {
            "output_size": WIDTH,
            "attention_heads": 4,
            "linear_units": 4 * WIDTH,
            "num_blocks": 6,
            "attention_dropout_rate": 0.0,
            "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "kernel_size": 11,
            "sanm_shfit": 0,
            "selfattention_layer_type": "sanm",
            **dropout,
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": 4 * WIDTH,
            "num_blocks": 2,
            "att_layer_num": 2,
            "kernel_size": 11,
            "sanm_shfit": 0,
            "self_attention_dropout_rate": 0.0,
            "src_attention_dropout_rate": 0.0,
            **dropout,
        },
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": WIDTH, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "ctc_weight": ctc_weight,
        "lsm_weight": 0.1,
        "length_normalized_loss": True,
        "predictor_weight": 1.0,
        "predictor_bias": 1,
        "sampling_ratio": 0.0,
        "input_size": 560,
        "vocab_size": len(TOKENS),
    }


class Trainee(torch.nn.Module):
    """Paraformer with its losses; `forward` trains, `decode` recognises a batch as the exported graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.paraformer = Paraformer(**configuration(ctc_weight=0.3))

    def _encode(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder frames `[B, T, d]` float32 and the weights `[B, T]` of the predictor."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            encoded, _, _ = self.paraformer.encoder(features, lengths)
        encoded = encoded.float()
        predictor = self.paraformer.predictor
        mask = torch.arange(encoded.shape[1])[None] < lengths[:, None]
        context = (encoded * mask[..., None]).transpose(1, 2)
        hidden = torch.relu(predictor.cif_conv1d(predictor.pad(context))).transpose(1, 2)
        alphas = torch.sigmoid(predictor.cif_output(hidden)).squeeze(-1) * mask
        return encoded, alphas

    def forward(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        targets: torch.Tensor,
        target_lengths: torch.Tensor,
        text_lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of a batch: cross-entropy, CTC, and the predictor's count.

        `features` [B, T, 560], `targets` [B, N] padded with -1 and ended by `</s>`, `target_lengths` with the end, or
        with the ends where the text is empty; `text_lengths` without.
        """
        encoded, alphas = self._encode(features, lengths)
        count = alphas.sum(1)
        embeddings = integrate(alphas * (target_lengths / count.clamp_min(1e-3))[:, None], targets.shape[1]) @ encoded
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            logits, _ = self.paraformer.decoder(encoded, lengths, embeddings, target_lengths)
            ctc_logits = self.paraformer.ctc.ctc_lo(encoded)
        loss_ce = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=-1, label_smoothing=0.1
        )
        loss_ctc = torch.nn.functional.ctc_loss(
            ctc_logits.float().log_softmax(-1).transpose(0, 1), targets, lengths, text_lengths, zero_infinity=True
        )
        weight = torch.where(text_lengths == 0, EMPTY_WEIGHT, 1.0)
        wanted = torch.where(text_lengths == 0, EMPTY_COUNT, text_lengths + 1.0)
        loss_count = (weight * (count - wanted).abs()).sum() / target_lengths.sum()
        loss = 0.7 * loss_ce + 0.3 * loss_ctc + loss_count
        return loss, {"ce": loss_ce.item(), "ctc": loss_ctc.item(), "count": loss_count.item()}

    @torch.no_grad()
    def decode(self, features: torch.Tensor, lengths: torch.Tensor) -> list[list[int]]:
        """Token ids of each utterance, special tokens dropped."""
        encoded, alphas = self._encode(features, lengths)
        tail = torch.zeros_like(alphas[:, :1])
        counts = (alphas.double().sum(1) + 0.45).floor().long()
        if counts.max() == 0:
            return [[] for _ in counts]
        rows = torch.cat([alphas, tail], 1)
        rows[torch.arange(len(rows)), lengths] = 0.45
        frames = torch.cat([encoded, torch.zeros_like(encoded[:, :1])], 1)
        embeddings = integrate(rows, int(counts.max())) @ frames
        logits, _ = self.paraformer.decoder(encoded, lengths, embeddings, counts)
        ids = logits.argmax(-1)
        return [[i for i in row[:n].tolist() if i > EOS] for row, n in zip(ids, counts.tolist(), strict=True)]


def integrate(alphas: torch.Tensor, tokens: int) -> torch.Tensor:
    """CIF as the matrix `[B, tokens, T]` of each frame's share in each token: the overlap of two intervals."""
    ends = torch.cumsum(alphas.double(), 1)
    starts = ends - alphas
    token = torch.arange(tokens, dtype=ends.dtype)[None, :, None]
    overlap = torch.minimum(ends[:, None], token + 1) - torch.maximum(starts[:, None], token)
    return overlap.clamp_min(0).float()
