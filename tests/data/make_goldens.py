#!/usr/bin/env python3
"""Write goldens made by FunASR's own torch code: `tiny.npz`, `small.npz`, `large.npz` beside this file.

    pip install -e '.[recipe]' sherpa-onnx
    python tests/data/make_goldens.py [tiny] [small] [large] [--bundles FOLDER]

A Paraformer with the weights of `tests/random_weights.py` recognises each utterance alone, in float32, on one thread:

* by the steps of FunASR's `Paraformer.inference`: encode, calc_predictor (`cif_v1`), cal_decoder_with_predictor;
* by the module that FunASR exports (`cif_v1_export`, count = floor of the sum with the tail): this one is stored.
  Where the two differ, the script says so;
* by onnxruntime and by sherpa-onnx on the graph exported from it: they are compared here; sherpa-onnx's ids are stored.

Features are edge_asr's, after they have been found equal to FunASR's WavFrontend within 1e-4. It has to be without
torchaudio, when it takes kaldi-native-fbank as we do: torchaudio's filterbank differs by up to 2e-3, in one value of
10,000 by more than 1e-4.

Stored per utterance: raw argmax ids, their log-probabilities, their lead over the second best, `alphas` of the frames
without the tail, mean and deviation of the features, sherpa-onnx's ids, and two lists of times in milliseconds, both by
`ts_prediction_lfr6_standard` with upsample_rate 1, force_time_shift -1.5, no offset, for the tokens other than ids 0, 1
and 2. Both see T + 1 frames, the tail's included, so a last token may end at (T + 1) * 60 ms.

* `times`: us_alphas = alphas with the tail, us_peaks = the fires of `cif_v1` (1 + fraction where a token ends);
* `swapped`: what `Paraformer.inference` really does with `pred_timestamp`: it passes the two the other way round, and
  integrates the fires as if they were weights. Compared here with `Paraformer.inference` itself.

With --bundles each exported model stays in FOLDER/SIZE as a bundle.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import sherpa_onnx
import torch
import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

# Each import of a module registers its classes with FunASR.
import funasr.models.paraformer.cif_predictor
import funasr.models.paraformer.decoder
import funasr.models.sanm.encoder
import random_weights
from funasr.frontends.wav_frontend import WavFrontend
from funasr.models.paraformer.export_meta import export_rebuild_model
from funasr.models.paraformer.model import Paraformer
from funasr.utils.timestamp_tools import ts_prediction_lfr6_standard
from random_weights import DIMENSIONS, HEADS, KERNEL, SCALE, SHIFT, UTTERANCES, VOCABULARIES

from edge_asr.recognizer.features import FeatureExtractor
from edge_asr.types import SAMPLE_RATE

HERE = Path(__file__).parent
CERTAIN = 1e-3
"""Lead over the second best above which ids must agree."""
SPECIAL_IDS = 3


@dataclass
class Answer:
    """What one implementation says of one utterance."""

    ids: np.ndarray
    log_probabilities: np.ndarray
    leads: np.ndarray
    alphas: np.ndarray
    """With the tail."""
    fires: np.ndarray


class Tokens:
    """FunASR's tokenizer, as far as inference asks for it."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def ids2tokens(self, ids: list[int]) -> list[str]:
        """Return the pieces."""
        return [self.tokens[i] for i in ids]

    def tokens2text(self, pieces: list[str]) -> str:
        """Return the text."""
        return "".join(pieces)


def main() -> None:
    """Make the goldens of the sizes asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=list(random_weights.SIZES), metavar="size")
    parser.add_argument("--bundles", type=Path, help="folder where the exported models stay")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.bundles / size if options.bundles else Path(scratch)
            make(size, folder)


def make(size: str, folder: Path) -> None:
    """Write `SIZE.npz`, and the exported bundle to a folder."""
    sounds = [random_weights.utterance(index) for index in range(UTTERANCES[size])]
    tokens = Tokens(token_list(size))
    write_side_files(size, tokens.tokens, folder)
    features = checked_features(sounds, folder / "am.mvn")
    answers, really_swapped = ask_funasr(size, features, tokens, folder / "model.onnx")
    in_onnx = each(f"{size} onnxruntime", onnx_runner(folder / "model.onnx"), features)
    by_sherpa = each(f"{size} sherpa-onnx", sherpa_runner(folder, tokens), sounds)

    times = [predict(answer.alphas, answer.fires, answer.ids, tokens) for answer in answers]
    swapped = [predict(answer.fires, answer.alphas, answer.ids, tokens) for answer in answers]
    compare("onnxruntime, export module", in_onnx, answers)
    compare_sherpa(by_sherpa, answers)
    compare_times(really_swapped, swapped)
    store(HERE / f"{size}.npz", size, features, answers, by_sherpa, times, swapped)


def ask_funasr(
    size: str, features: list[np.ndarray], tokens: Tokens, graph: Path
) -> tuple[list[Answer], list[list[list[int]]]]:
    """Return what the export module says, and the times of `Paraformer.inference`; write the graph."""
    model = funasr_model(size)
    inference = each(f"{size} inference", lambda rows: infer(model, rows), features)
    times = each(f"{size} inference's times", lambda rows: inference_times(model, rows, tokens), features)
    parts = {part: configuration(size)[part] for part in ("encoder", "predictor", "decoder")}
    exported = export_rebuild_model(model, type="onnx", device="cpu", max_seq_len=512, **parts)
    answers = each(f"{size} export module", lambda rows: infer_export(exported, rows), features)
    compare("torch inference, export module", inference, answers)
    export_graph(size, exported, graph)
    return answers, times


def each(what: str, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Return the work done on each item, with a bar."""
    return [work(item) for item in tqdm(items, desc=what)]


# Model and bundle


def configuration(size: str) -> dict[str, Any]:
    """Return the published architecture at that size."""
    width, hidden, encoder, decoder = DIMENSIONS[size]
    shared = {"attention_heads": HEADS, "linear_units": hidden, "kernel_size": KERNEL, "sanm_shfit": 0}
    return {
        "encoder": "SANMEncoder",
        "encoder_conf": {
            **shared,
            "output_size": width,
            "num_blocks": encoder,
            "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True,
            "selfattention_layer_type": "sanm",
        },
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {**shared, "num_blocks": decoder, "att_layer_num": decoder},
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": width, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "ctc_weight": 0.0,
        "predictor_bias": 1,
        "input_size": random_weights.FEATURES,
        "vocab_size": VOCABULARIES[size],
    }


def funasr_model(size: str) -> Paraformer:
    """Return FunASR's model with our weights; only what inference does not use may be missing."""
    model = Paraformer(**configuration(size)).eval()
    weights = {name: torch.from_numpy(values) for name, values in random_weights.state_dict(size).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing != ["decoder.embed.0.weight"] or unexpected:
        raise RuntimeError(f"weights do not fit: {missing} missing, {unexpected} unexpected")
    return model


def token_list(size: str) -> list[str]:
    """Return special tokens, Chinese characters, `<unk>`."""
    return ["<blank>", "<s>", "</s>", *(chr(0x4E00 + i) for i in range(VOCABULARIES[size] - 4)), "<unk>"]


def write_side_files(size: str, tokens: list[str], folder: Path) -> None:
    """Write what a bundle has beside its graph."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    (folder / "tokens.txt").write_text("".join(f"{t} {i}\n" for i, t in enumerate(tokens)), encoding="utf-8")
    row = {name: "[ " + " ".join(map(str, values)) + " ]" for name, values in (("shift", SHIFT), ("scale", SCALE))}
    (folder / "am.mvn").write_text(
        "<Nnet>\n<Splice> 560 560\n[ 0 ]\n"
        f"<AddShift> 560 560\n<LearnRateCoef> 0 {row['shift']}\n"
        f"<Rescale> 560 560\n<LearnRateCoef> 0 {row['scale']}\n</Nnet>\n",
        encoding="utf-8",
    )
    frontend = {"fs": SAMPLE_RATE, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10}
    frontend |= {"lfr_m": 7, "lfr_n": 6}
    published = {"model": "Paraformer", "frontend": "WavFrontend", "frontend_conf": frontend, **configuration(size)}
    (folder / "config.yaml").write_text(yaml.safe_dump(published, sort_keys=False), encoding="utf-8")


def export_graph(size: str, exported: Any, path: Path) -> None:
    """Write the ONNX graph with sherpa-onnx's metadata."""
    torch.onnx.export(
        exported,
        exported.export_dummy_inputs(),
        str(path),
        opset_version=14,
        do_constant_folding=True,
        input_names=exported.export_input_names(),
        output_names=exported.export_output_names(),
        dynamic_axes=exported.export_dynamic_axes(),
        dynamo=False,
    )
    metadata = {
        "vocab_size": VOCABULARIES[size],
        "model_type": "paraformer",
        "version": 1,
        "model_author": "random",
        "comment": "random",
        "lfr_window_size": 7,
        "lfr_window_shift": 6,
        "neg_mean": ",".join(map(str, SHIFT)),
        "inv_stddev": ",".join(map(str, SCALE)),
    }
    graph = onnx.load(str(path))
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=str(value))
    onnx.save(graph, str(path))


# Recognition


def checked_features(sounds: list[np.ndarray], cmvn: Path) -> list[np.ndarray]:
    """Return our features, after comparing them with FunASR's."""
    extract = FeatureExtractor(SHIFT, SCALE)
    frontend = WavFrontend(str(cmvn), lfr_m=7, lfr_n=6, dither=0.0)
    features, worst = [], 0.0
    for sound in tqdm(sounds, desc="features"):
        ours = extract(sound)
        theirs, _ = frontend(torch.from_numpy(sound)[None], torch.tensor([len(sound)]))
        worst = max(worst, float(np.abs(theirs[0].numpy() - ours).max()))
        features.append(ours)
    print(f"features: largest difference from WavFrontend {worst:.1e}")
    if worst > 1e-4:
        raise RuntimeError("our features are not FunASR's; if torchaudio is installed, try without")
    return features


def infer(model: Paraformer, features: np.ndarray) -> Answer:
    """Recognise by the steps of `Paraformer.inference`."""
    encoded, lengths = model.encode(torch.from_numpy(features)[None], torch.tensor([len(features)]))
    embeddings, count, alphas, fires = model.calc_predictor(encoded, lengths)
    count = count.round().long()
    if count.max() < 1:
        return answer(torch.zeros(0, 2), alphas, fires)
    scores, _ = model.cal_decoder_with_predictor(encoded, lengths, embeddings, count)
    return answer(scores[0, : int(count)], alphas, fires)


def infer_export(model: Any, features: np.ndarray) -> Answer:
    """Recognise by the module that is exported."""
    speech, lengths = torch.from_numpy(features)[None], torch.tensor([len(features)], dtype=torch.int32)
    encoded, _ = model.encoder(speech, lengths)
    _, count, alphas, fires = model.predictor(encoded, model.make_pad_mask(lengths)[:, None, :])
    if int(count) < 1:
        return answer(torch.zeros(0, 2), alphas, fires)
    scores, counts = model(speech, lengths)
    return answer(scores[0, : int(counts)], alphas, fires)


def onnx_runner(path: Path) -> Callable[[np.ndarray], Answer]:
    """Return a function that recognises on the exported graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(features: np.ndarray) -> Answer:
        lengths = np.array([len(features)], np.int32)
        scores, count = session.run(["logits", "token_num"], {"speech": features[None], "speech_lengths": lengths})
        empty = torch.zeros(1, 0)
        return answer(torch.from_numpy(scores[0, : int(count[0])]), empty, empty)

    return run


def sherpa_runner(folder: Path, tokens: Tokens) -> Callable[[np.ndarray], list[int]]:
    """Return a function that gives sherpa-onnx's ids of a sound."""
    recognizer = sherpa_onnx.OfflineRecognizer.from_paraformer(
        str(folder / "model.onnx"), str(folder / "tokens.txt"), num_threads=1
    )
    number = {token: index for index, token in enumerate(tokens.tokens)}

    def run(sound: np.ndarray) -> list[int]:
        stream = recognizer.create_stream()
        stream.accept_waveform(SAMPLE_RATE, sound)
        recognizer.decode_stream(stream)
        return [number[token] for token in stream.result.tokens]

    return run


def answer(scores: torch.Tensor, alphas: torch.Tensor, fires: torch.Tensor) -> Answer:
    """Return the best ids of scores `[N, V]`."""
    values, ids = scores.topk(2)
    leads = values[:, 0] - values[:, 1]
    return Answer(ids[:, 0].numpy(), values[:, 0].numpy(), leads.numpy(), alphas[0].numpy(), fires[0].numpy())


# Times


def predict(us_alphas: np.ndarray, us_peaks: np.ndarray, ids: np.ndarray, tokens: Tokens) -> list[list[int]]:
    """Return FunASR's times of the tokens; it writes into what it is given, hence the copies."""
    pieces = tokens.ids2tokens([i for i in ids.tolist() if i >= SPECIAL_IDS])
    alphas, peaks = torch.from_numpy(us_alphas.copy()), torch.from_numpy(us_peaks.copy())
    _, times = ts_prediction_lfr6_standard(alphas, peaks, pieces, upsample_rate=1)
    return times


def inference_times(model: Paraformer, features: np.ndarray, tokens: Tokens) -> list[list[int]]:
    """Return the times that `Paraformer.inference` gives, before it joins words."""
    seen: list[list[list[int]]] = []
    original = funasr.models.paraformer.model.ts_prediction_lfr6_standard

    def listen(*arguments: Any, **options: Any) -> Any:
        text, times = original(*arguments, **options)
        seen.append(copy.deepcopy(times))
        return text, times

    funasr.models.paraformer.model.ts_prediction_lfr6_standard = listen
    try:
        speech, lengths = torch.from_numpy(features)[None], torch.tensor([[len(features)]])
        settings = {"data_type": "fbank", "device": "cpu", "pred_timestamp": True}
        model.inference(speech, lengths, key=["utterance"], tokenizer=tokens, **settings)
    finally:
        funasr.models.paraformer.model.ts_prediction_lfr6_standard = original
    return seen[0] if seen else []


# Comparison


def compare(what: str, ours: list[Answer], theirs: list[Answer]) -> None:
    """Say how far two implementations agree."""
    pairs = list(zip(ours, theirs, strict=True))
    counts = [index for index, (a, b) in enumerate(pairs) if len(a.ids) != len(b.ids)]
    same = [(a, b) for a, b in pairs if len(a.ids) == len(b.ids)]
    ids = sum(int(((a.ids != b.ids) & (b.leads > CERTAIN)).sum()) for a, b in same)
    unsure = sum(int(((a.ids != b.ids) & (b.leads <= CERTAIN)).sum()) for a, b in same)
    tokens = sum(len(b.ids) for _, b in same)
    scores = max(largest(a.log_probabilities - b.log_probabilities) for a, b in same)
    alphas = max(largest(a.alphas - b.alphas) if a.alphas.size else 0.0 for a, b in pairs)
    print(
        f"{what}: {len(pairs)} utterances, {tokens} tokens; counts differ in {counts}, ids in {ids} where certain,"
        f" in {unsure} where not; largest difference of log-probability {scores:.1e}, of alphas {alphas:.1e}"
    )


def largest(difference: np.ndarray) -> float:
    """Return the largest absolute value, 0 of nothing."""
    return float(np.abs(difference).max(initial=0))


def compare_sherpa(by_sherpa: list[list[int]], answers: list[Answer]) -> None:
    """Compare with ids up to the first 2, where sherpa-onnx stops."""
    counts, ids, stops = [], 0, 0
    for index, (theirs, one) in enumerate(zip(by_sherpa, answers, strict=True)):
        expected = one.ids.tolist()
        stops += 2 in expected
        expected = expected[: expected.index(2)] if 2 in expected else expected
        if len(theirs) != len(expected):
            counts.append(index)
            continue
        ids += sum(a != b and lead > CERTAIN for a, b, lead in zip(theirs, expected, one.leads, strict=False))
    print(f"sherpa-onnx: counts differ in {counts}, ids in {ids} where certain; {stops} utterances hold id 2")


def compare_times(inside: list[Any], swapped: list[Any]) -> None:
    """Compare what we fed with what `Paraformer.inference` fed."""
    different = [index for index, (a, b) in enumerate(zip(inside, swapped, strict=True)) if a != b]
    print(f"times as Paraformer.inference gives them differ from `swapped` in {different}")


# Storage


def store(
    path: Path,
    size: str,
    features: list[np.ndarray],
    answers: list[Answer],
    by_sherpa: list[list[int]],
    times: list[Any],
    swapped: list[Any],
) -> None:
    """Write one compressed file: lists of all utterances end to end, with their lengths."""
    ids = np.concatenate([one.ids for one in answers])
    np.savez_compressed(
        path,
        weights=random_weights.weights_fingerprint(size),
        sounds=random_weights.sounds_fingerprint(size),
        feature_means=np.array([rows.mean(dtype=np.float64) for rows in features], np.float32),
        feature_deviations=np.array([rows.std(dtype=np.float64) for rows in features], np.float32),
        frames=lengths(features),
        alphas=np.concatenate([one.alphas[:-1] for one in answers]),
        counts=lengths([one.ids for one in answers]),
        ids=ids.astype(np.uint16),
        log_probabilities=np.concatenate([one.log_probabilities for one in answers]),
        leads=np.concatenate([one.leads for one in answers]),
        sherpa_counts=lengths(by_sherpa),
        sherpa_ids=np.array(list(chain(*by_sherpa)), np.uint16),
        times_counts=lengths(times),
        times=np.array(list(chain(*times)), np.int32).reshape(-1, 2),
        swapped_counts=lengths(swapped),
        swapped=np.array(list(chain(*swapped)), np.int32).reshape(-1, 2),
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    print(f"{path.name}: {path.stat().st_size} bytes, {len(ids)} tokens, {digest}")


def lengths(items: list[Any]) -> np.ndarray:
    """Return the length of each item."""
    return np.array([len(item) for item in items], np.uint16)


if __name__ == "__main__":
    main()
