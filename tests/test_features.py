"""Features against kaldi-native-fbank, an own implementation of kaldi's filterbank, and a slow one of the stacking."""

from __future__ import annotations

import kaldi_native_fbank as knf
import numpy as np
import numpy.typing as npt
import pytest
from bundled import sound_of, transcripts

from edge_asr.recognizer.features import BINS, WIDTH, FeatureExtractor, Features, stack_frames
from edge_asr.types import SAMPLE_RATE, Samples

Float64 = npt.NDArray[np.float64]

FRAME, SHIFT, FFT = 400, 160, 512
TOLERANCE = 2e-3
"""In natural log: kaldi computes in float32. Frames of digital silence excepted, whose energy is rounding."""
NATIVE = 2e-3
ZEROS, ONES = np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32)


def mel(hertz: Float64) -> Float64:
    return 1127.0 * np.log1p(hertz / 700.0)


def mel_weights() -> Float64:
    """Return the triangles `[80, 257]` over the bins of the spectrum, equally wide in mel from 20 to 8000 Hz."""
    lowest, highest = mel(np.array([20.0, SAMPLE_RATE / 2]))
    edges = np.linspace(lowest, highest, BINS + 2)
    bins = mel(np.arange(FFT // 2 + 1) * SAMPLE_RATE / FFT)
    weights = np.zeros((BINS, len(bins)))
    for index, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
        weights[index] = np.maximum(0, np.minimum(rising, falling))
    return weights


def kaldi_filterbank(samples: Samples) -> Float64:
    """Return `[frames, 80]` of kaldi's compute-fbank-feats: DC removed, pre-emphasis, Hamming, power, mel, log."""
    scaled = samples.astype(np.float64) * 32768
    count = max(0, 1 + (len(scaled) - FRAME) // SHIFT)
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(FRAME) / (FRAME - 1))
    weights = mel_weights()
    rows = np.zeros((count, BINS))
    for index in range(count):
        frame = scaled[index * SHIFT : index * SHIFT + FRAME]
        frame = frame - frame.mean()
        emphasised = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(emphasised * window, FFT)) ** 2
        rows[index] = np.log(np.maximum(weights @ power, np.finfo(np.float32).eps))
    return rows


def noise(samples: int, level: float = 0.1) -> Samples:
    return (np.random.default_rng(samples).standard_normal(samples) * level).astype(np.float32)


def chirp() -> Samples:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    return (0.5 * np.sin(2 * np.pi * (50 + 3900 * time) * time)).astype(np.float32)


def frames_of(samples: Samples) -> Features:
    return FeatureExtractor(ZEROS, ONES)._filterbank(samples)


@pytest.mark.parametrize(
    "samples",
    [noise(16_000), noise(5_000, 1e-3), noise(399 + 160), chirp(), noise(8_000) + np.float32(0.3)],
    ids=["loud noise", "soft noise", "one frame", "chirp", "noise on a constant"],
)
def test_the_filterbank_is_kaldis(samples: Samples) -> None:
    expected = kaldi_filterbank(samples)
    assert len(expected) > 0
    np.testing.assert_allclose(frames_of(samples), expected, atol=TOLERANCE)


def test_the_filterbank_of_speech_is_kaldis() -> None:
    samples = sound_of("01.wav")
    expected = kaldi_filterbank(samples)
    heard = expected.min(axis=1) > 0
    assert heard.mean() > 0.5
    np.testing.assert_allclose(frames_of(samples)[heard], expected[heard], atol=TOLERANCE)


def test_digital_silence_gives_finite_features() -> None:
    frames = frames_of(np.zeros(4_000, np.float32))
    np.testing.assert_allclose(frames, kaldi_filterbank(np.zeros(4_000, np.float32)), atol=TOLERANCE)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (1, 0), (399, 0), (400, 1), (559, 1), (560, 2), (16_000, 98)])
def test_only_whole_frames_count(samples: int, frames: int) -> None:
    assert frames_of(noise(samples)).shape == (frames, BINS)


def test_samples_may_be_a_view_with_gaps() -> None:
    stereo = noise(32_000).reshape(-1, 2)
    np.testing.assert_array_equal(frames_of(stereo[:, 0]), frames_of(stereo[:, 0].copy()))


# kaldi-native-fbank computes in float32 as well, in another order


def native_filterbank(samples: Samples) -> Features:
    """Return `[frames, 80]` of kaldi-native-fbank."""
    options = knf.FbankOptions()
    frame = options.frame_opts
    frame.samp_freq, frame.frame_length_ms, frame.frame_shift_ms = SAMPLE_RATE, 25.0, 10.0
    frame.window_type, frame.snip_edges, frame.dither = "hamming", True, 0.0
    options.mel_opts.num_bins = BINS
    options.energy_floor = 0.0
    bank = knf.OnlineFbank(options)
    bank.accept_waveform(SAMPLE_RATE, (samples * np.float32(32768)).tolist())
    bank.input_finished()
    return np.array([bank.get_frame(index) for index in range(bank.num_frames_ready)], np.float32).reshape(-1, BINS)


def mixed(samples: int) -> Samples:
    """Return loud noise, digital silence, soft noise, in turns."""
    levels = np.repeat(np.array([0.5, 0.0, 1e-4, 0.0, 0.02], np.float32), -(-samples // 5))[:samples]
    return noise(samples, 1.0) * levels


@pytest.mark.parametrize("name", transcripts())
def test_the_filterbank_of_every_bundled_recording_is_that_of_kaldi_native_fbank(name: str) -> None:
    samples = sound_of(name)
    np.testing.assert_allclose(frames_of(samples), native_filterbank(samples), atol=NATIVE)


@pytest.mark.parametrize(
    "samples",
    [
        *(noise(count) for count in (400, 401, 559, 560, 400 + 59 * 160, 400 + 60 * 160, 400 + 61 * 160, 480_000)),
        noise(16_000, 1.0).clip(-1, 1),
        noise(16_000, 1e-3),
        noise(16_000, 3e-5),
        np.round(noise(16_000, 3e-5) * np.float32(32768)) / np.float32(32768),
        noise(16_000, 0.01) + np.float32(0.9),
        chirp(),
        mixed(16_000),
        np.zeros(16_000, np.float32),
        np.full(16_000, 0.25, np.float32),
    ],
    ids=[
        "a frame", "a frame and a sample", "just a frame", "two frames", "a block", "a block and a frame",
        "a block and two frames", "30 s", "clipped", "soft", "hardly any", "one bit", "on a large constant",
        "chirp", "sound and silence", "digital silence", "a constant",
    ],
)  # fmt: skip
def test_the_filterbank_is_that_of_kaldi_native_fbank(samples: Samples) -> None:
    np.testing.assert_allclose(frames_of(samples), native_filterbank(samples), atol=NATIVE)


@pytest.mark.parametrize("level", [1e-2, 1e-3])
def test_softly_on_a_large_constant_it_is_as_exact_as_kaldi_native_fbank(level: float) -> None:
    """What is soft beside a constant has lost digits before it comes to us: neither has them."""
    samples = noise(16_000, level) - np.float32(0.5)
    exact = kaldi_filterbank(samples)
    ours, native = (np.abs(frames - exact).max() for frames in (frames_of(samples), native_filterbank(samples)))
    assert ours <= max(native, NATIVE)


# Stacking


def slow_stack(frames: Features) -> Features:
    """Low frame rate word for word: 3 copies of the first frame before, windows of 7 every 6, the last repeated."""
    padded = [frames[0]] * 3 + list(frames)
    rows = []
    for row in range(-(-len(frames) // 6)):
        window = padded[row * 6 : row * 6 + 7]
        rows.append(np.concatenate(window + [padded[-1]] * (7 - len(window))))
    return np.array(rows, np.float32)


@pytest.mark.parametrize("count", [*range(1, 21), 97, 98, 99, 100])
def test_stacking_is_low_frame_rate_7_by_6(count: int) -> None:
    frames = np.random.default_rng(count).standard_normal((count, BINS)).astype(np.float32)
    np.testing.assert_array_equal(stack_frames(frames), slow_stack(frames))


@pytest.mark.parametrize("count", range(1, 21))
def test_there_is_a_row_for_every_six_frames_begun(count: int) -> None:
    assert stack_frames(np.zeros((count, BINS), np.float32)).shape == (-(-count // 6), WIDTH)


# Normalisation and shape


def test_features_are_stacked_frames_shifted_and_scaled() -> None:
    rng = np.random.default_rng(0)
    neg_mean = rng.normal(-10, 1, WIDTH).astype(np.float32)
    inv_stddev = rng.uniform(0.1, 0.3, WIDTH).astype(np.float32)
    samples = noise(16_000)
    features = FeatureExtractor(neg_mean, inv_stddev)(samples)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, (slow_stack(frames_of(samples)) + neg_mean) * inv_stddev, rtol=1e-6)


@pytest.mark.parametrize("samples", [0, 1, 399])
def test_less_than_25_ms_has_no_rows(samples: int) -> None:
    features = FeatureExtractor(ZEROS, ONES)(noise(samples))
    assert features.shape == (0, WIDTH)
    assert features.dtype == np.float32


def test_a_second_has_17_rows() -> None:
    assert FeatureExtractor(ZEROS, ONES)(noise(16_000)).shape == (17, WIDTH)


def test_an_extractor_keeps_nothing_of_the_sound_before() -> None:
    extractor = FeatureExtractor(ZEROS, ONES)
    first = extractor(noise(8_000))
    extractor(chirp())
    np.testing.assert_array_equal(extractor(noise(8_000)), first)
