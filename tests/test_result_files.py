"""Results come back from files as they were, from older files as far as those tell, and from damaged or hostile ones not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsharp
from fastsharp import SampleEstimate, results
from fastsharp.errors import DataFormatError, DataNotFoundError, InputError
from fastsharp.params import ParamLayout
from fastsharp.results import (
    Bracket,
    Calls,
    Comparison,
    Coupling,
    Density,
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    Explanation,
    GGNSpectrum,
    Invariance,
    Landscape2D,
    LayerSpectra,
    LayerSpectrum,
    Report,
    Result,
    Sharpness,
    Spectrum,
)
from fastsharp.results._export import LARGE, checksum

GOLDEN = Path(__file__).parent / "golden"
SUFFIXES = (".json", ".npz", ".safetensors")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIRS = Eigenpairs(
    eigenvalues=f64(1 / 3, -2.0),
    eigenvectors=torch.tensor([[0.6, 0.8, -0.0], [1e-30, 0.0, 1.0]]),
    residuals=f64(1e-17, math.nan),
    error_bounds=f64(math.inf, 5e-324),
    converged=torch.tensor([True, False]),
    verified=True,
    n_matvec=7,
    n_verify=2,
    notes=("naïve λ", 'a "quoted" / ~ note'),
    settings={"tol": 1e-3, "which": "LA", "budget": math.inf, "plan": {"a/b": [1, None, -math.inf]}, "shift": torch.tensor([1, 2])},
    provenance={"torch": "2.14"},
    layout=ParamLayout(("0.weight", "0.bias"), ((1, 2), (1,)), (0, 2, 3)),
)
DENSITY = Density(
    nodes=f64(-1.0, 2.0),
    weights=f64(0.25, 0.75),
    widths=f64(0.1, 0.1),
    probes=((f64(-1.0, 2.0), f64(0.25, 0.75)), (f64(0.5), f64(1.0))),
    edges=torch.empty(0, dtype=torch.float64),
    lower=torch.empty(0, dtype=torch.float64),
    upper=torch.empty(0, dtype=torch.float64),
    w1_bound=math.inf,
    confidence=0.95,
    n=3,
    n_matvec=4,
)
ESTIMATE = Estimate(value=1.5, stderr=math.nan, interval=(1.0, math.inf), confidence=0.95, samples=8, n_matvec=24, converged=False)
SPECTRUM = Spectrum(eigenpairs=PAIRS, density=DENSITY, trace=ESTIMATE, frobenius=None, n_matvec=30, notes=("one",))
COMPARED = Report(
    {"trace": ESTIMATE}, {"trace": "curvature"}, {"margin": "no classes"}, SPECTRUM, None, None, {"products": 30.0}, ("a report",)
)
INVARIANCE = Invariance(
    measures=("trace", "margin"),
    rescalings=("0 x 4, 2 / 4", "temperature 2"),
    kinds=("layers", "temperature"),
    base=f64(1.5, -0.0),
    values=torch.tensor([[6.0, 0.0], [math.nan, 0.25]], dtype=torch.float64),
    errors=torch.tensor([[0.5, 1e-9], [math.inf, 1e-9]], dtype=torch.float64),
    outputs=f64(0.0, 1e-16),
    applicable=("0 x 4, 2 / 4", "2 x 4, 4 / 4", "temperature 2"),
    refused={"4 -> 6": "between them: Tanh"},
    skipped={"fisher_rao": "no samples"},
)
COMPARISON = Comparison(
    a=COMPARED,
    b=dataclasses.replace(COMPARED, measures={"trace": dataclasses.replace(ESTIMATE, value=3.0)}),
    k=2,
    overlap=0.5,
    overlap_error=1e-3,
    angles=f64(0.25, 1.25),
    random_overlap=2 / 3,
    w1=0.125,
    w1_bound=math.inf,
    w1_confidence=0.9,
    t=f64(-0.25, 0.0, 1.0),
    losses=f64(math.inf, 0.5, 0.25),
    barrier=0.0,
    barrier_at=0.0,
    disagreement=None,
    measures={"trace": ESTIMATE},
    skipped={"margin": "in a: no classes"},
)
SHARPNESS = Sharpness(0.5, 0.1, (0.25, 0.75), 0.95, 8, 0, True, ("paired",), noise_floor=math.nan, changes=f64(0.5, -0.25), passes=9.0)
PER_SAMPLE = SampleEstimate(2.0, 0.0, (2.0, 2.0), 0.9, 3, 0, True, per_sample=f64(1.0, math.inf, -0.0))
LANDSCAPE = Landscape2D(1.5, f64(-1.0, 0.0, 1.0), f64(0.5, 0.0, 0.25)[None], f64(0.75), f64(-0.0), f64(), torch.empty(0, 0).double())
REPORT = Report(
    measures={"trace": ESTIMATE, "sam": SHARPNESS, "margin": PER_SAMPLE},
    groups={"trace": "curvature", "sam": "perturbation", "margin": "function"},
    skipped={"input_jacobian": 'no <float> "inputs"'},
    spectrum=SPECTRUM,
    layers=None,
    landscape=LANDSCAPE,
    cost={"products": 7.0, "seconds.curvature": math.inf},
    notes=("<script>alert(1)</script>",),
    settings={"parts": ["curvature"], "rho": 0.005},
    provenance={"model": "Net"},
)
RESULTS: dict[str, Result] = {
    "eigenpairs": PAIRS,
    "density": DENSITY,
    "estimate": ESTIMATE,
    "spectrum": SPECTRUM,
    "sharpness": SHARPNESS,
    "sample_estimate": PER_SAMPLE,
    "landscape": LANDSCAPE,
    "report": REPORT,
    "bracket": Bracket(1.0, 2.0, 1.5, 0.95, 10, 100, 5, ((10, 1.0, 2.0), (20, -math.inf, 1.75)), True),
    "explanation": Explanation("rop", {"mlp": "a convolution"}, (Calls("aten::gelu", 3, "rule", ("a", "")),), "", {"mlp": "wide"}),
    "invariance": INVARIANCE,
    "comparison": COMPARISON,
}
LAYOUT = ParamLayout(("0.weight",), ((2,),), (0, 2))
LAYER = LayerSpectrum(
    "0", "Linear", ("0.weight",), 2, f64(2.0, -1.0), f64(0.0, 1e-9), f64(0.0, 1e-9), torch.tensor([True, True]), ESTIMATE, 5, "dense"
)
RESULTS |= {
    "ggn_spectrum": GGNSpectrum(f64(3.0, 0.5), torch.eye(2), 2, 6, 3.5, math.hypot(3.0, 0.5), 1e-16, layout=LAYOUT),
    "diagonal_estimate": DiagonalEstimate(f64(1.0, -0.0), f64(0.5, math.inf), (-1.96, 1.96), 0.95, 8, 16, layout=LAYOUT),
    "layer_spectra": LayerSpectra(
        (LAYER, dataclasses.replace(LAYER, norm=(2.2, 0.1), coupling=(0.0, math.nan), eigenvectors=torch.eye(2), layout=LAYOUT)),
        Coupling((0.5, 0.1), (2.2, 0.1), (0.05, 0.01), 8, f64(1.0, 2.0)[None], None),
        8,
    ),
}
NESTED = {Calls, Coupling, LayerSpectrum}  # parts of results


def same(a: Any, b: Any) -> bool:
    """Equal in type, value and sign, NaN included; lists stand for the tuples of `Any` fields."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_comes_back_bit_for_bit(name: str, suffix: str, tmp_path: Path) -> None:
    path = RESULTS[name].save(tmp_path / f"a{suffix}")
    assert same(RESULTS[name], fastsharp.load(path))
    assert list(tmp_path.iterdir()) == [path]


def test_the_comparison_sees_a_difference() -> None:
    assert not same(PAIRS, dataclasses.replace(PAIRS, eigenvectors=PAIRS.eigenvectors.double()))
    assert not same(PAIRS, dataclasses.replace(PAIRS, eigenvectors=PAIRS.eigenvectors.abs()))
    assert not same(ESTIMATE, dataclasses.replace(ESTIMATE, interval=(1.0, math.nan)))


def test_every_result_is_a_case_here() -> None:
    """A new class of results is a Result, so that it can be saved, and has its sample and golden files."""
    classes = {c for c in vars(results).values() if isinstance(c, type) and dataclasses.is_dataclass(c)} - NESTED | {SampleEstimate}
    assert {type(r) for r in RESULTS.values()} == classes
    for cls in classes:
        assert issubclass(cls, Result)
        assert not {f.name for f in dataclasses.fields(cls)} & {"schema", "schema_version", "tensors", "not_finite", "sha256"}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", RESULTS)
def test_golden_files_stay_readable(name: str, suffix: str, tmp_path: Path) -> None:
    """Every version that was ever written; the present one is still written like this. A new version gets new golden files."""
    path = GOLDEN / f"{name}-{RESULTS[name].schema_version}{suffix}"
    assert same(RESULTS[name], fastsharp.load(path))
    assert path.read_bytes() == RESULTS[name].save(tmp_path / path.name).read_bytes()


def test_the_record_of_the_command_line_before_version_2_is_read() -> None:
    pairs = fastsharp.load(GOLDEN / "eigenpairs-1.json")
    assert isinstance(pairs, Eigenpairs) and len(pairs) == 3 and pairs.converged.tolist() == [True] * 3
    assert pairs.eigenvalues.tolist() == [0.9067295776829718, 0.3617634829073157, 0.3216125906527672]
    assert math.isnan(pairs.error_bounds[0]) and pairs.eigenvectors.shape == (3, 26) and pairs.eigenvectors.is_meta
    assert pairs.settings["tol"] == 0.001 and pairs.provenance["n"] == 26


def test_the_file_of_a_real_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.arange(8) % 2)
    pairs = fastsharp.lanczos(model, [batch], k=2)
    for suffix in SUFFIXES:
        back = fastsharp.load(pairs.save(tmp_path / f"pairs{suffix}"))
        assert isinstance(back, Eigenpairs)
        assert torch.equal(back.eigenvectors, pairs.eigenvectors) and back.notes == pairs.notes
        assert {k: v.shape for k, v in back.as_dict(0).items()} == {"weight": (2, 3), "bias": (2,)}


@dataclasses.dataclass(frozen=True, eq=False)
class OfEveryKind(Result, version=3):
    """Fields of every kind that files hold; no notes."""

    by_name: Mapping[str, torch.Tensor]
    nested: Mapping[str, tuple[Estimate, ...]]
    either: float | torch.Tensor
    other: float | torch.Tensor | None
    names: list[str]
    anything: Any
    half: torch.Tensor
    empty: torch.Tensor
    scalar: torch.Tensor


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_class_of_the_callers_comes_back_too(suffix: str, tmp_path: Path) -> None:
    half = torch.tensor([65504.0, math.nan, 6e-8], dtype=torch.float16)
    numbers = torch.arange(6).reshape(2, 3)
    own = OfEveryKind(
        by_name={"0.weight": f64(1.0), "a/b~c": torch.eye(2)[:, 1]},
        nested={"x": (ESTIMATE, ESTIMATE), "y": ()},
        either=math.nan,
        other=numbers.T,
        names=["a"],
        anything={"tensor": numbers.int(), "list": [1, 2.5, "x", None, math.inf]},
        half=half,
        empty=torch.zeros(0, 3),
        scalar=torch.tensor(7),
    )
    back = fastsharp.load(own.save(tmp_path / f"own{suffix}"))
    assert same(own, back)
    assert (own.schema, own.schema_version) == ("fastsharp.of_every_kind", 3)


# --- strict JSON ------------------------------------------------------------------------------------------------------


def test_what_json_has_no_sign_for_is_null_with_its_reason() -> None:
    def refuse(token: str) -> None:
        raise AssertionError(token)

    content = json.loads(PAIRS.to_json(), parse_constant=refuse)
    assert content["error_bounds"] == [None, 5e-324] and content["residuals"] == [1e-17, None]
    assert content["not_finite"] == {
        "/residuals/1": "nan",
        "/error_bounds/0": "inf",
        "/settings/budget": "inf",
        "/settings/plan/a~1b/2": "-inf",
    }
    assert (content["schema"], content["schema_version"]) == ("fastsharp.eigenpairs", 2)


def test_settings_become_plain_values() -> None:
    odd = {"dtype": torch.float32, "loss": torch.nn.functional.mse_loss, "set": {2, 1}, "numpy": np.float32(0.5), "array": np.arange(2)}
    content = json.loads(dataclasses.replace(ESTIMATE, settings=odd).to_json())
    loss = "torch.nn.functional.mse_loss"
    assert content["settings"] == {"dtype": "torch.float32", "loss": loss, "set": [1, 2], "numpy": 0.5, "array": [0, 1]}


def test_large_vectors_stay_out_of_json_unless_asked_for(tmp_path: Path) -> None:
    n = LARGE // 2 + 1
    vectors = torch.linspace(-1, 1, 2 * n).reshape(2, n)
    pairs = dataclasses.replace(PAIRS, eigenvectors=vectors, layout=None)
    without = fastsharp.load(pairs.save(tmp_path / "a.json"))
    assert isinstance(without, Eigenpairs) and without.eigenvectors.is_meta and without.eigenvectors.shape == (2, n)
    assert without.eigenvectors.dtype == torch.float32 and without.notes[-1].endswith("eigenvectors")
    assert same(without.eigenvalues, pairs.eigenvalues)
    again = fastsharp.load(without.save(tmp_path / "b.npz"))  # what is not there is not made up
    assert isinstance(again, Eigenpairs) and again.eigenvectors.is_meta and again.notes == without.notes
    for path in (pairs.save(tmp_path / "c.json", large=True), pairs.save(tmp_path / "d.npz")):
        assert same(pairs, fastsharp.load(path))
    assert fastsharp.load(pairs.save(tmp_path / "e.safetensors", large=False)).eigenvectors.is_meta  # type: ignore[attr-defined]


def test_vectors_that_were_left_out_are_missed_aloud() -> None:
    absent = dataclasses.replace(PAIRS, eigenvectors=PAIRS.eigenvectors.to("meta"))
    with pytest.raises(InputError, match="no vectors"):
        absent.as_dict(0)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_older_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in SUFFIXES:
        path = ESTIMATE.save(tmp_path / f"a{suffix}")
        before = path.read_bytes()
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                PAIRS.save(path)
        assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert {ESTIMATE.save(tmp_path / f"a{suffix}").stat().st_mode for suffix in SUFFIXES} == {(tmp_path / "plain").stat().st_mode}


def test_what_files_cannot_hold_is_refused_before_they_are_touched(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.json, \.npz or \.safetensors"):
        PAIRS.save(tmp_path / "a.pkl")
    with pytest.raises(InputError, match="bfloat16"):
        dataclasses.replace(PAIRS, eigenvectors=PAIRS.eigenvectors.bfloat16()).save(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


# --- reading what is no result ------------------------------------------------------------------------------------------


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(DataFormatError, match=match) as e:
        fastsharp.load(path)
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) <= 5


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_is_refused(suffix: str, tmp_path: Path) -> None:
    whole = (GOLDEN / f"estimate-1{suffix}").read_bytes()
    path = tmp_path / f"a{suffix}"
    for end in range(0, len(whole.rstrip()), 7):
        path.write_bytes(whole[:end])
        refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_flipped_bit_is_refused_or_changes_nothing(suffix: str, tmp_path: Path) -> None:
    """White space and the unused parts of containers aside, every bit counts."""
    whole = (GOLDEN / f"eigenpairs-2{suffix}").read_bytes()
    path = tmp_path / f"a{suffix}"
    read = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            back = fastsharp.load(path)
        except DataFormatError:
            continue
        assert same(PAIRS, back)
        read += 1
    assert read < 0.2 * len(whole) / 7  # zip keeps dates, attributes and lengths twice; JSON has its spaces


def test_no_file_and_no_suffix(tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"absent\.json"):
        fastsharp.load(tmp_path / "absent.json")
    with pytest.raises(InputError, match=r"\.npz"):
        fastsharp.load(tmp_path / "a.txt")


def edited(change: Callable[[dict[str, Any]], Any], name: str = "eigenpairs-2.json") -> str:
    """A golden file changed, with a right checksum: what a hostile writer makes."""
    content = json.loads((GOLDEN / name).read_text())
    content = change(content) or content
    if isinstance(content, dict):
        content["sha256"] = checksum(content)
    return json.dumps(content)


def put(*steps: Any) -> Callable[[dict[str, Any]], Any]:
    """content[steps[0]]...[steps[-2]] = steps[-1]."""

    def change(content: Any) -> None:
        for step in steps[:-2]:
            content = content[step]
        content[steps[-2]] = steps[-1]

    return change


HOSTILE = {
    "other schema": (put("schema", "somebody.else"), "none of fastsharp.bracket"),
    "newer version": (put("schema_version", 3), "reads up to 2"),
    "version is text": (put("schema_version", "2"), "version '2'"),
    "version zero": (put("schema_version", 0), "version 0"),
    "a list": (lambda c: [c], "no schema"),
    "no schema": (lambda c: c.pop("schema") and c, "no schema"),
    "a field is missing": (lambda c: c.pop("n_matvec") and c, "n_matvec is not there"),
    "a number is text": (put("n_matvec", "7"), "n_matvec is not of type int"),
    "a flag is a number": (put("verified", 1), "verified is not of type bool"),
    "notes are text": (put("notes", "abc"), "notes is not a list"),
    "values are short": (put("eigenvalues", [1.0]), "eigenvalues is not float64"),
    "values are ragged": (put("eigenvectors", [[1.0], [1.0, 2.0]]), "eigenvectors is not float32"),
    "values are text": (put("eigenvalues", ["a", "b"]), "eigenvalues/0 is not of type float"),
    "a null without a reason": (put("eigenvalues", [None, 1.0]), "eigenvalues/0 is not"),
    "a sign that is none": (put("not_finite", "/residuals/1", "1e6"), "residuals/1 is not inf"),
    "an unknown dtype": (put("tensors", "/eigenvalues", "dtype", "object"), "eigenvalues is not of a dtype"),
    "a vast shape": (put("tensors", "/eigenvalues", "shape", [2**62, 2**62]), "eigenvalues is not of a size"),
    "a negative shape": (put("tensors", "/eigenvalues", "shape", [-2]), "eigenvalues is not of a shape"),
    "a tensor elsewhere": (put("tensors", "/eigenvalues", "values", "http://x"), "eigenvalues is not inline"),
    "an array that JSON cannot have": (put("tensors", "/eigenvalues", "values", "file"), "the array eigenvalues is missing"),
    "a tensor without its entry": (lambda c: c["tensors"].pop("/eigenvalues") and c, "eigenvalues is not a tensor"),
    "tensors are a list": (put("tensors", []), "'tensors' is no object"),
    "a tensor for a number": (lambda c: c["tensors"].update({"/n_matvec": c["tensors"]["/eigenvalues"]}) or put("n_matvec", None)(c), "n_matvec"),
    "a layout of another model": (put("layout", "offsets", [0, 2, 9]), "layout of the parameters"),
    "flags are numbers": (put("converged", [1, 0]), "converged/0 is not of type bool"),
    "flags and values differ": (
        lambda c: c["tensors"]["/converged"].update(shape=[1]) or put("converged", [True])(c),
        "differ in length",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_json_file_is_refused(case: str, tmp_path: Path) -> None:
    change, match = HOSTILE[case]
    path = tmp_path / "a.json"
    path.write_text(edited(change))
    refused(path, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "strict JSON"),
        ("[" * 100_000, "."),
        ('{"schema": "fastsharp.estimate", "schema_version": 1, "value": NaN}', "NaN is not JSON"),
        ('{"schema": "fastsharp.estimate", "schema_version": 1, "value": 1e999, "sha256": ""}', "1e999 is beyond"),
        ('{"schema": "fastsharp.estimate", "schema_version": 1}', "checksum is missing"),
        ('{"schema": "fastsharp.eigenpairs", "schema_version": 1}', "version 1"),
        ("9" * 10_000, "strict JSON"),
        ("\udcff".encode("utf-8", "surrogatepass").decode("latin-1"), "strict JSON"),
    ],
)
def test_what_is_no_json_of_ours_is_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    refused(path, match)


def npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return path


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(npz(tmp_path / "pickle.npz", {"fastsharp.npy": pickled.getvalue()}), "another size")
    refused(npz(tmp_path / "object.npz", {"fastsharp.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"a" * 8)}), "NPZ")
    columns = npy("{'descr': '<f8', 'fortran_order': True, 'shape': (1, 1)}", b"a" * 8)
    refused(npz(tmp_path / "order.npz", {"fastsharp.npy": columns}), "another order")
    vast = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 1000)}")
    refused(npz(tmp_path / "vast.npz", {"fastsharp.npy": vast}), "another size")
    refused(npz(tmp_path / "bomb.npz", {"fastsharp.npy": b"\0" * 10**6}, zipfile.ZIP_DEFLATED), "larger than the file")
    refused(npz(tmp_path / "code.npz", {"fastsharp.npy": npy("__import__('os')")}), "NPZ")
    refused(npz(tmp_path / "none.npz", {"weights.npy": npy("{'descr': '<f8', 'fortran_order': False, 'shape': (0,)}")}), "no array")
    (tmp_path / "text.npz").write_bytes(b"PK\x03\x04" + b"a" * 100)
    refused(tmp_path / "text.npz", "NPZ")


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", "no 'fastsharp' in its metadata")
    save_file({"weight": torch.zeros(2)}, tmp_path / "empty.safetensors", metadata={"fastsharp": "{}"})
    refused(tmp_path / "empty.safetensors", "no schema")
    (tmp_path / "long.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(tmp_path / "long.safetensors", "whole safetensors")


def test_arrays_exchanged_between_files_are_noticed(tmp_path: Path) -> None:
    """The JSON object knows the hash of each array."""
    other = dataclasses.replace(PAIRS, eigenvectors=PAIRS.eigenvectors.flip(0))
    with np.load(PAIRS.save(tmp_path / "a.npz"), allow_pickle=False) as a, np.load(other.save(tmp_path / "b.npz"), allow_pickle=False) as b:
        np.savez(tmp_path / "c.npz", **{**a, "eigenvectors": b["eigenvectors"]})
    refused(tmp_path / "c.npz", "checksum")


def test_other_programs_read_the_arrays(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    with np.load(PAIRS.save(tmp_path / "a.npz"), allow_pickle=False) as arrays:
        assert arrays["eigenvectors"].tolist() == PAIRS.eigenvectors.tolist()
    assert load_file(PAIRS.save(tmp_path / "a.safetensors"))["eigenvalues"].tolist() == PAIRS.eigenvalues.tolist()
    with np.load(RESULTS["spectrum"].save(tmp_path / "s.npz"), allow_pickle=False) as arrays:
        assert arrays["density/probes/1/0"].tolist() == [0.5]
