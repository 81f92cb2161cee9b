"""The filterbank that Paraformer takes, for training: kaldi's, 80 bins every 10 ms."""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def filterbank(samples: Array) -> Array:
    """Return `[frames, 80]` log-mel energies of 16 kHz samples (full scale +-1)."""
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = 16_000
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hamming"
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 80
    options.energy_floor = 0
    bank = knf.OnlineFbank(options)
    bank.accept_waveform(16_000, (samples * 32768).tolist())
    bank.input_finished()
    if bank.num_frames_ready == 0:
        return np.zeros((0, 80), np.float32)
    return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
