"""The catalogue: the models that can be pulled by name, and the bundled one. Data only; unknown facts are None.

Sizes and hashes of published files are those that several independent projects pin for them; a file that is replaced
upstream is refused until it has been looked at here.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file of a model."""

    path: str
    """Where it lies below the model's folder, as published."""
    size: int | None = None
    """Bytes."""
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """A place on the network that has a model's files as `<base>/<path>`."""

    name: str
    base: str

    def url(self, file: ModelFile) -> str:
        """Return the address of a file."""
        return f"{self.base}/{quote(file.path)}"


@dataclass(frozen=True, slots=True)
class Golden:
    """A recording that comes with a model, and the text that was published for it."""

    recording: str
    text: str


@dataclass(frozen=True, slots=True)
class Licence:
    """Terms of a model."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the catalogue."""

    name: str
    about: str
    published: str
    """Name that it was published under: of its folder, as archives unpack it and people copy it."""
    licences: tuple[Licence, ...]
    files: tuple[ModelFile, ...]
    goldens: tuple[Golden, ...]
    sources: tuple[Source, ...] = ()
    """Where it can be pulled from, in the order in which they are tried; empty: it cannot be."""

    @property
    def size(self) -> int | None:
        """Bytes of the files that are known; None where it is unknown of more than recordings."""
        recordings = {golden.recording for golden in self.goldens}
        if any(file.size is None and file.path not in recordings for file in self.files):
            return None
        return sum(file.size or 0 for file in self.files)


HUGGING_FACE = "https://huggingface.co"


def _hugging_face(repository: str) -> Source:
    return Source("huggingface", f"{HUGGING_FACE}/{repository}/resolve/main")


def _model_scope(repository: str) -> Source:
    return Source("modelscope", f"https://modelscope.cn/models/{repository}/resolve/master")


_APACHE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_FUNASR = Licence(
    "FunASR Model Open Source License Agreement 1.1", "https://github.com/modelscope/FunASR/blob/main/MODEL_LICENSE"
)

BUNDLED = Entry(
    name="paraformer-tiny",
    about="bundled, for demonstration and tests: some 60 command words and numbers",
    published="paraformer-tiny",
    licences=(_APACHE,),
    files=(
        ModelFile("model.onnx", 14_595_910, "5d29cbd7acf9a79a4e96fd244c6638ce61a43e2a963754b8357f64f912546e6a"),
        ModelFile("model_quant.onnx", 4_559_708, "ec7b6bcf690eb169f0c1a433cc9cb1ac1c2f027a08df6f8dc417e25f857f9a8b"),
        ModelFile("am.mvn", 22_183, "858d0694bbbe48d14345d745eb70f9db5ec7b23004b44a97ebea68a4059da345"),
        ModelFile("tokens.json", 771, "808dfc85f1ce038b64df17f69c5eec09890f3409c9e3db9207d07bf89b6343df"),
        *(ModelFile(f"samples/{number:02}.wav") for number in range(1, 9)),
    ),
    goldens=(
        Golden("samples/01.wav", "打开客厅灯"),
        Golden("samples/02.wav", "把卧室空调调到二十六度"),
        Golden("samples/03.wav", "现在几点"),
        Golden("samples/04.wav", "音量调到百分之三十五"),
        Golden("samples/05.wav", "启动三号产线"),
        Golden("samples/06.wav", "设置二十分钟闹钟"),
        Golden("samples/07.wav", "一三八零五二七四"),
        Golden("samples/08.wav", "急停仓库传送带"),
    ),
)

# The texts of the two sherpa-onnx bundles are what sherpa-onnx's documentation prints. ModelScope's copies have
# the same network and tokens; whether they have the recordings is not known: each file may come from the other source.
_SMALL = Entry(
    name="paraformer-small",
    about="Mandarin and some English, int8; small and fast",
    published="sherpa-onnx-paraformer-zh-small-2024-03-09",
    licences=(_FUNASR,),
    files=(
        ModelFile("model.int8.onnx", 81_828_675, "3ef6c19369b912f7caf3cef8e545c5ccd1a33d9d7ec792a46668dc41c4b229ec"),
        ModelFile("tokens.txt", 75_352, "4b2d964e18b9cf139b473003b6698fb2ed9a2a5ec55b93daa677b28f578897aa"),
        ModelFile("test_wavs/1.wav"),
    ),
    goldens=(Golden("test_wavs/1.wav", "重点呢想谈三个问题首先呢就是这一轮全球金融动荡的表现"),),
    sources=(
        _hugging_face("csukuangfj/sherpa-onnx-paraformer-zh-small-2024-03-09"),
        _model_scope("pengzhendong/sherpa-onnx-paraformer-zh-small"),
    ),
)

_LARGE_ZH_EN = Entry(
    name="paraformer-large-zh-en",
    about="Mandarin, some of its dialects and English, int8; as sherpa-onnx exports it",
    published="sherpa-onnx-paraformer-zh-2024-03-09",
    licences=(_FUNASR, _APACHE),
    files=(
        ModelFile("model.int8.onnx", 227_330_205, "90bc03034ae1bef9575f8cc798cd1519c8be8aa9e8b458a033e32017ff4d584c"),
        ModelFile("tokens.txt", 75_354, "6c0e3b35cece259829e6cb5b8d90d13db88f61ea3a2953d11898e4b2bfd7a2e2"),
        ModelFile("test_wavs/1.wav"),
    ),
    goldens=(Golden("test_wavs/1.wav", "重点呢想谈三个问题首先呢就是这一轮全球金融动荡的表现"),),
    sources=(
        _hugging_face("csukuangfj/sherpa-onnx-paraformer-zh-2024-03-09"),
        _model_scope("pengzhendong/sherpa-onnx-paraformer-zh"),
    ),
)

_LARGE = Entry(
    name="paraformer-large",
    about="Mandarin, int8; FunASR's own export, about 240 MB",
    published="speech_paraformer-large_asr_nat-zh-cn-16k-common-vocab8404-onnx",
    licences=(_FUNASR, _APACHE),
    files=(
        ModelFile("model_quant.onnx", None, "c3a06538f867c8e3d9bb9c9e1b44b126a50d732862f6c428b1b5896ee9be65c5"),
        ModelFile("am.mvn", 11_203, "29b3c740a2c0cfc6b308126d31d7f265fa2be74f3bb095cd2f143ea970896ae5"),
        ModelFile("tokens.json", 93_676, "2b20c2b12572d682afff84ce1c8d560f67b8b32a4c1f21567411d141ed352127"),
        ModelFile("config.yaml", 2_509, "bfd424b9f61846aac63591e96fe24d66b35f4643bddcb4b9bb759db8f987ab79"),
        ModelFile("example/asr_example.wav"),
    ),
    goldens=(Golden("example/asr_example.wav", "欢迎大家来体验达摩院推出的语音识别模型"),),
    sources=(_model_scope("iic/speech_paraformer-large_asr_nat-zh-cn-16k-common-vocab8404-onnx"),),
)

CATALOGUE = {entry.name: entry for entry in (BUNDLED, _SMALL, _LARGE, _LARGE_ZH_EN)}
"""All entries by name."""
