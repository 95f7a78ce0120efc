"""MLPerf Inference rounds v5.0 and v5.1 as data: seeds, models, limits, quality targets.

Sources, by the letter that stands beside a figure; where they give none, the field is None:

- C: mlperf.conf of the round's LoadGen: mlcommons/inference, loadgen/mlperf.conf, tag v5.0.1 of
  2025 (mlcommons-loadgen 5.0.13), and for v5.1 mlcommons-loadgen 5.1.2.
- R: mlcommons/inference_policies, inference_rules.adoc, 2025-02-25 (v5.0).
- K: mlcommons/inference, tools/submission/submission_checker.py, tag v5.0.1, and v5.1.

Names are those of mlperf.conf. Llama-3.1-8B is of v5.1; v5.0 does not have it.
"""

from __future__ import annotations

from dataclasses import dataclass

from distbench.cli import nearest
from distbench.errors import UsageError
from distbench.loadgen_rng import LEMIRE, REJECT, WHOLE

MS = 1_000_000
MIN_DURATION_NS = 600_000 * MS
"""C: ``*.*.min_duration = 600000``, every scenario."""
MIN_QUERIES = {"server": 100, "singlestream": 100, "multistream": 662}
"""C for MultiStream; 100 is LoadGen's own default (loadgen/test_settings.h)."""
PERCENTILES = {"server": 99 * 0.01, "singlestream": 90 * 0.01, "multistream": 99 * 0.01}
"""C: in percent there; LoadGen multiplies by 0.01 in double precision."""
SAMPLES_PER_QUERY = 8
"""C: MultiStream."""
OFFLINE_LIMIT = 24_576
"""C: Offline has at least so many samples, or as many as the dataset if those are fewer."""


@dataclass(frozen=True)
class Seeds:
    """The seeds of a round, C.

    Attributes:
        qsl: which samples are loaded.
        sample_index: which of them each query carries.
        schedule: when Server's queries are due.
    """

    qsl: int
    sample_index: int
    schedule: int


@dataclass(frozen=True)
class Tokens:
    """Limits on the 99th percentiles of a token model, C.

    Attributes:
        ttft_ns: time to the first token.
        tpot_ns: time per output token after the first.
    """

    ttft_ns: int
    tpot_ns: int


@dataclass(frozen=True)
class Target:
    """One quality target.

    Attributes:
        metric: what is scored.
        reference: score of the reference implementation; None where the sources give none.
        least: factors of the reference that must be reached, one for each variant of the benchmark.
        most: factor that must not be exceeded; None if there is none.
    """

    metric: str
    reference: float | None
    least: tuple[float, ...]
    most: float | None = None


@dataclass(frozen=True)
class Model:
    """One benchmark of a round.

    Attributes:
        name: in mlperf.conf.
        dataset: what its samples are, R.
        scenarios: of the datacenter suite that it has to run, R; empty if it is edge only.
        performance_samples: samples that stay loaded (``performance_sample_count``), C; None: all.
        offline_samples: least samples of an Offline run, C.
        quality: targets, R.
        server_latency_ns: limit on Server's p99, C; None with token limits or without Server.
        server_tokens: Server's token limits, C.
        interactive: limits of the interactive variant, C; None if the round has none.
        equal_issue: every sample as often as any other (``sample_concatenate_permutation``), C.
    """

    name: str
    dataset: str
    scenarios: tuple[str, ...]
    performance_samples: int | None
    offline_samples: int
    quality: tuple[Target, ...]
    server_latency_ns: int | None = None
    server_tokens: Tokens | None = None
    interactive: Tokens | None = None
    equal_issue: bool = False


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        name: as ``--rules`` takes it.
        seeds: C.
        models: in the order of the rules.
        loadgen: version of mlcommons-loadgen whose figures these are.
        variant: random variant that this wheel was built with, found by running it.
        subset: how it chooses the resident samples, found likewise.
    """

    name: str
    seeds: Seeds
    models: tuple[Model, ...]
    loadgen: str
    variant: str
    subset: str

    def model(self, name: str) -> Model:
        """Return a model by its name in mlperf.conf.

        Raises:
            UsageError: the round has no such model.
        """
        for model in self.models:
            if model.name == name:
                return model
        names = [model.name for model in self.models]
        raise UsageError(
            f"{self.name} has no model {name!r}{nearest(name, names)}; it has {', '.join(names)}: "
            "leave the model out for another"
        )


_BOTH, _OFFLINE = ("server", "offline"), ("offline",)
_99, _99_AND_999 = (0.99,), (0.99, 0.999)

_RESNET50 = Model(
    "resnet50", "ImageNet 224x224", _BOTH, 1024, 24_576,
    (Target("top-1 accuracy, %", 76.46, _99),),
    server_latency_ns=15 * MS,
)  # fmt: skip
_RETINANET = Model(
    "retinanet", "OpenImages 800x800", _BOTH, 64, 24_576, (Target("mAP", 0.3755, _99),),
    server_latency_ns=100 * MS,
)  # fmt: skip
_UNET3D = Model(
    # R has 42 samples, C and K 43; R has a mean DICE of 0.8633, K 0.8617.
    "3d-unet", "KiTS19", _OFFLINE, None, 43, (Target("mean DICE", 0.8633, _99_AND_999),),
    equal_issue=True,
)  # fmt: skip
_GPTJ = Model(
    "gptj", "CNN-DailyMail", _BOTH, 13_368, 13_368,
    (
        Target("ROUGE-1", 42.9865, _99_AND_999),
        Target("ROUGE-2", 20.1235, _99_AND_999),
        Target("ROUGE-L", 29.9881, _99_AND_999),
        Target("generated length", 4_016_878, (0.9,)),
    ),
    server_latency_ns=20_000 * MS, equal_issue=True,
)  # fmt: skip
_LLAMA2 = Model(
    "llama2-70b", "OpenOrca", _BOTH, 24_576, 24_576,
    (
        Target("ROUGE-1", 44.4312, _99_AND_999),
        Target("ROUGE-2", 22.0352, _99_AND_999),
        Target("ROUGE-L", 28.6162, _99_AND_999),
        Target("tokens per sample", 294.45, (0.9,), 1.1),
    ),
    server_tokens=Tokens(2000 * MS, 200 * MS), interactive=Tokens(450 * MS, 40 * MS),
    equal_issue=True,
)  # fmt: skip
_LLAMA31_405B = Model(
    "llama3_1-405b", "long context", _BOTH, 8_313, 8_313, (Target("accuracy", None, _99),),
    server_tokens=Tokens(6000 * MS, 175 * MS), equal_issue=True,
)  # fmt: skip
_LLAMA31_405B_INTERACTIVE = Model(
    "llama3_1-405b", "long context", _BOTH, 8_313, 8_313, (Target("accuracy", None, _99),),
    server_tokens=Tokens(6000 * MS, 175 * MS), interactive=Tokens(4500 * MS, 80 * MS),
    equal_issue=True,
)  # fmt: skip
_LLAMA31_8B = Model(
    "llama3_1-8b", "CNN-DailyMail", _BOTH, 13_368, 13_368,
    (
        # K: R repeats GPT-J's row.
        Target("ROUGE-1", 38.7792, _99),
        Target("ROUGE-2", 15.9075, _99),
        Target("ROUGE-L", 24.4957, _99),
        Target("ROUGE-Lsum", 35.793, _99),
        Target("generated characters", 8_167_644, (0.9,), 1.1),
    ),
    server_tokens=Tokens(2000 * MS, 100 * MS), interactive=Tokens(500 * MS, 30 * MS),
    equal_issue=True,
)  # fmt: skip
_MIXTRAL = Model(
    "mixtral-8x7b", "3 x 5,000", _BOTH, 15_000, 15_000, (Target("accuracy", None, _99),),
    server_tokens=Tokens(2000 * MS, 200 * MS), equal_issue=True,
)  # fmt: skip
_DEEPSEEK = Model(
    "deepseek-r1", "", _BOTH, 4_388, 4_388, (),
    server_tokens=Tokens(2000 * MS, 80 * MS), equal_issue=True,
)  # fmt: skip
_DLRM = Model(
    "dlrm-v2", "Criteo multihot", _BOTH, 204_800, 24_576,
    (Target("AUC, %", 80.31, _99_AND_999),), server_latency_ns=60 * MS,
)  # fmt: skip
_SDXL = Model(
    # The targets are windows of FID and CLIP; their figures are not among the sources.
    "stable-diffusion-xl", "COCO-2014", _BOTH, 5_000, 5_000,
    (Target("FID", None, ()), Target("CLIP", None, ())), server_latency_ns=20_000 * MS,
)  # fmt: skip
_RGAT = Model(
    "rgat", "IGBH", _OFFLINE, 788_379, 788_379, (Target("accuracy, %", 72.86, _99),),
    equal_issue=True,
)  # fmt: skip
_WHISPER = Model("whisper", "", _OFFLINE, 1_633, 1_633, (), equal_issue=True)
# Edge only in v5.0; the Server limit remains in C.
_BERT = Model("bert", "", (), 10_833, 10_833, (), server_latency_ns=130 * MS)

V5_0 = Round(
    name="mlperf-v5.0",
    seeds=Seeds(6023615788873153749, 15036839855038426416, 9933818062894767841),
    models=(
        _RESNET50, _RETINANET, _UNET3D, _GPTJ, _LLAMA2, _LLAMA31_405B, _MIXTRAL, _DLRM, _SDXL,
        _RGAT, _BERT,
    ),
    loadgen="5.0.13",
    variant=REJECT,
    subset=WHOLE,
)  # fmt: skip
V5_1 = Round(
    name="mlperf-v5.1",
    seeds=Seeds(1780908523862526354, 14771362308971278857, 18209322760996052031),
    # ResNet50 and GPT-J have left the datacenter suite. Targets that v5.0 has are taken over.
    models=(
        _RETINANET, _UNET3D, _LLAMA31_8B, _LLAMA2, _LLAMA31_405B_INTERACTIVE, _MIXTRAL, _DEEPSEEK,
        _DLRM, _SDXL, _RGAT, _WHISPER,
    ),
    loadgen="5.1.2",
    variant=LEMIRE,
    subset=WHOLE,
)  # fmt: skip
ROUNDS = {each.name: each for each in (V5_0, V5_1)}
