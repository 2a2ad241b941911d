"""PolarQuantizer: the chain of stages that turns vectors into codes.

    row x ── / 2^e ── radius r, direction x / r ── class ── rotation ── fine stage ── codes
                      (or the row as it is)        (or one)  (or none)
    codes:  (n, n_fields) integers:   [ r | class | fine fields ... ]   all but the last optional

Each step has its inverse beside it, and each may be absent, so that product, residual, Polar-VQ,
scalar and trellis quantizers are settings of this one chain (named in ``presets``). The fine stage:

    "codebook"  heads x residual stages of k-means codewords   residual.ProductResidualQuantizer
    "grid"      uniform scalar levels for each component       scalar.GridQuantizer
    "lloyd"     one set of Lloyd-Max levels for all components scalar.ScalarQuantizer
    "float16"   the half-precision pattern itself
    "bitshift"  trellis codes of fixed rate                    bitshift.BitshiftQuantizer
    "trellis"   entropy-coded dependent quantization           trellis.TrellisQuantizer

Everything learned is rounded to the precision at which it is stored before it is used, so a
quantizer read back from a file decodes exactly as the one that was fitted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ._arrays import Array, Float32, as_matrix, enter_codes, is_torch, largest, returner
from ._threads import in_threads
from .bitshift import MANTISSA, MANTISSAS, STEPS, BitshiftQuantizer
from .clustering import check_int
from .entropy.magnitude import MagnitudeModel, integers_from_bytes, integers_to_bytes
from .errors import (
    CorruptDataError,
    FormatError,
    InputError,
    LimitError,
    NotFittedError,
    UnsupportedVersionError,
)
from .frames import MAX_CLASSES, Frames
from .residual import MAX_BEAM, ProductResidualQuantizer
from .rotation import BLOCK_ROWS, KINDS, Int64, Rotation
from .scalar import GridQuantizer, ScalarQuantizer
from .trellis import TrellisQuantizer, water_level

Fine = Literal["codebook", "grid", "lloyd", "float16", "bitshift", "trellis"]
FINE_STAGES: tuple[str, ...] = ("codebook", "grid", "lloyd", "float16", "bitshift", "trellis")
SIZED = ("codebook", "bitshift")  # stages of fixed rate that take as many bits as they are given
SEARCHED = ("bitshift", "trellis")  # stages that decode to integers and may have classes of rows
MAGIC = b"PQ"
VERSION = 1
MAX_CONFIG = 1 << 21  # bytes of JSON: enough for a head for each of MAX_D columns
MAX_ARRAY = 1 << 31  # bytes of one array
CLIP = np.float32(2.0**50)  # |x| / 2^e beyond this is held at it: squares stay finite in float32
GRID_BITS = 16  # decoded coefficients are rounded to 2^-16 of the largest row before rotating back
ENCODE_ROWS = 1 << 15  # rows in work at a time
WIDE_FLOATS = 1 << 20  # numbers in work at a time as float64
FRAME_ROUNDS = 5  # of refitting classes and assigning rows
WALL_SHARE = 0.005  # of the numbers are within 1% of an extreme that is a wall and no accident
WORTH_HOLDING = 0.99  # of the error is left: holding decoded numbers at a wall gains 0.04 dB
DRIFT_ROWS = 512  # rows whose error stands for that of all


class Spectrum(NamedTuple):
    """What rows look like in a frame; K classes that occur, m coefficients."""

    expected: npt.NDArray[np.float64]  # (K, m) variances of the rows the frame was fitted on
    variances: npt.NDArray[np.float64]  # (K, m) mean squares of these rows
    shares: npt.NDArray[np.float64]  # (K,) of the rows
    energy: float  # mean |x|^2 a row
    left_out: float  # of it, what lies outside the frame


class PolarQuantizer:
    """Vectors -> integer codes and back, by a chain of stages (see the module's text).

    Parameters
    ----------
    heads, stages, n_codewords : the codebooks: slices of a row, residual stages in each, codewords
        in each stage (a power of two).
    radius_bits : bits of the radius; 0 codes rows as they are instead of radius and direction.
    radius_norm : "l2", or "max" (largest magnitude; the direction is then within [-1, 1]).
        "given" is what a fit with ``row_weights`` makes it: one over the root of a row's weight.
    bits : code bits per float. Replaces heads, stages and n_codewords by an allocation: with a KLT
        by reverse water-filling over its components, else evenly over as many heads as needed.
        In the rows layout a row takes as many whole bytes as there are in it, at least one.
    fine : the fine stage; "grid" and "lloyd" take ``scalar_bits`` bits a component.
    rotation : "none", "klt", "random", "hadamard", or an orthogonal (d, d) matrix (columns: axes).
    center : subtract the mean first; by default where there is a rotation.
    n_components : keep only this many KLT axes. rotation_exponent : its entries are stored as
        multiples of 2**-rotation_exponent; None: fine enough never to matter.
    n_classes, n_leading : one KLT for each class of rows, in the leading axes (``frames``).
    spherical : the first codebook stage is a codebook of directions.
    beam : width of the search through residual stages.
    n_states, step, rate_weight : of the trellis; step None is found from ``bits``.
    state_bits : of the bitshift trellis, which has 2**state_bits states.
    weights : (d,) importance of each dimension: the squared error of dimension j counts weights[j]
        times. Kept to about 5%, within 12 octaves of their geometric mean.
    layout : how files keep the codes by default: "archive" (entropy coded, smallest) or "rows"
        (fixed width, any row at once).

    Attributes after ``fit``: ``d_``, ``exponent_`` (rows are divided by 2**exponent_ first),
    ``columns_`` (and multiplied by 2**(columns_ / 8), column by column; or None),
    ``radius_``, ``rotation_``, ``fine_``, and ``low_`` and ``high_``: decoded numbers (still so
    divided) are held at these, where training rows never pass them, often come up to them, and it
    pays, as with the zeros of SIFT; else None.

    The original Polar-VQ configuration is the default: 8 heads, 4 stages of 1024 codewords and a
    4-bit radius, for vectors of 256 dimensions.
    """

    def __init__(
        self,
        *,
        heads: int = 8,
        stages: int = 4,
        n_codewords: int = 1024,
        radius_bits: int = 4,
        radius_norm: Literal["l2", "max", "given"] = "l2",
        bits: float | None = None,
        fine: Fine = "codebook",
        scalar_bits: int = 8,
        rotation: str | npt.NDArray[Any] = "none",
        center: bool | None = None,
        n_components: int | None = None,
        rotation_exponent: int | None = None,
        n_classes: int = 1,
        n_leading: int | None = None,
        spherical: bool = True,
        beam: int = 5,
        n_states: int = 8,
        step: float | None = None,
        rate_weight: float = 0.5,
        state_bits: int = 10,
        weights: npt.ArrayLike | None = None,
        layout: Literal["archive", "rows"] = "archive",
        seed: int = 0,
    ) -> None:
        self.heads = check_int("heads", heads, 1)
        self.stages = check_int("stages", stages, 1)
        self.n_codewords = check_int("n_codewords", n_codewords, 2, 1 << 16)
        if n_codewords & (n_codewords - 1):
            raise InputError(f"expected n_codewords to be a power of two, got {n_codewords}")
        self.radius_bits = check_int("radius_bits", radius_bits, 0, 16)
        if radius_norm not in ("l2", "max", "given"):
            raise InputError(f"expected radius_norm 'l2', 'max' or 'given', got {radius_norm!r}")
        if fine not in FINE_STAGES:
            raise InputError(f"expected fine to be one of {', '.join(FINE_STAGES)}, got {fine!r}")
        if isinstance(rotation, str) and rotation not in KINDS:
            raise InputError(f"expected rotation to be one of {', '.join(KINDS)}, got {rotation!r}")
        for name, value in (("bits", bits), ("step", step), ("rate_weight", rate_weight)):
            if value is not None and not isinstance(value, int | float | np.number):
                raise InputError(f"expected {name} to be a number, got {value!r}")
        if bits is not None and not 0 < bits <= 32:
            raise InputError(f"expected bits in (0, 32], got {bits}")
        if fine == "trellis" and bits is None and step is None:
            raise InputError("fine='trellis' needs bits= or step=")
        if fine == "bitshift" and bits is None:
            raise InputError("fine='bitshift' needs bits=")
        if n_classes > 1 and not (
            fine in SEARCHED and isinstance(rotation, str) and rotation == "klt"
        ):
            raise InputError("n_classes > 1 needs fine='trellis' or 'bitshift' and rotation='klt'")
        if layout not in ("archive", "rows") or (layout == "rows" and fine == "trellis"):
            raise InputError(
                f"expected layout 'archive', or 'rows' with a stage of fixed rate, got {layout!r} "
                f"with fine={fine!r}"
            )
        self.radius_norm, self.fine, self.rotation, self.bits = radius_norm, fine, rotation, bits
        self.layout = layout
        self.scalar_bits = check_int("scalar_bits", scalar_bits, 1, 16)
        self.center = (
            (not isinstance(rotation, str) or rotation != "none") if center is None else center
        )
        self.n_classes = check_int("n_classes", n_classes, 1, MAX_CLASSES)
        self.n_components = (
            None if n_components is None else check_int("n_components", n_components, 1)
        )
        self.n_leading = None if n_leading is None else check_int("n_leading", n_leading, 1)
        self.rotation_exponent = rotation_exponent
        self.spherical, self.beam = bool(spherical), check_int("beam", beam, 1, MAX_BEAM)
        self.seed = check_int("seed", seed, 0)
        self.n_states, self.step, self.rate_weight = n_states, step, rate_weight
        TrellisQuantizer(n_states=n_states, step=step, rate_weight=rate_weight)  # checks them
        self.state_bits = BitshiftQuantizer(state_bits=state_bits).state_bits
        self.weights = None if weights is None else check_weights(weights)
        self.d_ = 0
        self.exponent_ = 0
        self.columns_: Int64 | None = None
        self.radius_: ScalarQuantizer | None = None
        self.rotation_: Rotation | Frames = Rotation("none", center=False)
        self.fine_: Any = None
        self.usual_error_ = 0.0
        self.low_: np.float32 | None = None
        self.high_: np.float32 | None = None
        self._walls: tuple[np.float32 | None, np.float32 | None] = None, None
        self._coded_rotation: tuple[Any, list[tuple[str, Array, str, bytes]]] = None, []
        self.candidates: list[dict[str, Any]] = []  # what the planner tried, for ``report``

    # -- learning -----------------------------------------------------------------------------
    def fit(self, x: Any, *, row_weights: npt.ArrayLike | None = None) -> PolarQuantizer:
        """Learn every stage from training rows (n, d), n >= 1, of any float dtype. Returns self.

        row_weights: (n,) importance of each row: its squared error counts so many times. Rows are
        then divided by one over its root, of which codes keep a few bits, as of a radius; not with
        ``radius_bits``.

        Time is that of the stages: k-means for codebooks, O(n d^2) for a KLT, a few encodings of at
        most 32768 rows for a trellis. Extra memory: a float32 copy of x.
        Raises InputError for another shape, no rows, or rows that are not finite.
        """
        if row_weights is None:
            return self.fit_codes(self.fit_frame(x), x)
        if self.radius_bits:
            raise InputError("row_weights and a radius do not go together: expected radius_bits=0")
        rows = as_matrix(x)
        scale, factors = row_scale(row_weights, len(rows))
        return self.fit(rows / factors[:, None]).scaled_by(scale)

    def scaled_by(self, scale: ScalarQuantizer) -> PolarQuantizer:
        """Make a quantizer of weighted rows of this one, fitted without a radius to rows divided by
        the levels of ``row_scale``. Returns self."""
        self.radius_, self.radius_norm = scale, "given"
        self.low_ = self.high_ = None  # walls of rows that were divided
        self._walls = None, None
        return self

    def fit_codes(self, v: Float32, x: Any) -> PolarQuantizer:
        """The second half of ``fit``: the fine stage, from the rows v of ``fit_frame(x)``."""
        row_class, c = self.rotation_.analyse(v)
        self._fit_fine(c, row_class)
        rows = as_matrix(x)
        self._walls = _walls(self._scale(rows)) if self.fine in SEARCHED else (None, None)
        self._note_usual_error(rows)
        return self

    def fit_frame(
        self, x: Any, *, common: Rotation | None = None, n_rounds: int = FRAME_ROUNDS
    ) -> Float32:
        """The first half of ``fit``: scale, radius and rotation. Returns the rows (n, d) float32 as
        the rotation sees them: scaled, and unit directions where there is a radius. common: a KLT
        already fitted to these rows; n_rounds: of refining classes."""
        rows = as_matrix(x)
        if not len(rows):
            raise InputError(f"expected at least one row to fit on, got shape {rows.shape}")
        if rows.shape[1] > MAX_D:
            raise InputError(f"expected rows of at most {MAX_D} numbers, got shape {rows.shape}")
        self.d_ = rows.shape[1]
        self.columns_ = None if self.weights is None else _column_scales(self.weights, self.d_)
        self.exponent_ = _scale_exponent(rows)
        v = self._scale(rows)
        self.radius_ = None
        if self.radius_bits:
            radius, v = self._split(v)
            self.radius_ = ScalarQuantizer(n_bits=self.radius_bits, domain="log").fit(radius)
        self._fit_rotation(v, common, n_rounds)
        return v

    def spectrum(self, x: Any) -> Spectrum:
        """Second moments of rows x (n, d) in the fitted frame (of unit directions where there is a
        radius), beside those the frame expects. O(n d m)."""
        rows = as_matrix(x, d=self.d_)
        v = self._scale(rows)
        if self.radius_ is not None:
            v = self._split(v)[1]
        row_class, narrow = self.rotation_.analyse(v)
        c = narrow.astype(np.float64)
        counts = np.bincount(row_class, minlength=self.rotation_.n_classes)
        classes = np.flatnonzero(counts)
        variances = np.stack([(c[row_class == i] ** 2).mean(axis=0) for i in classes])
        energy = float(np.einsum("ij,ij->", v, v, dtype=np.float64)) / len(v)
        left_out = 0.0
        if self.rotation_.n_components_ < self.d_:
            centred = v - cast(Rotation, self.rotation_).mean_
            kept = float(variances.sum(axis=1) @ counts[classes]) / len(v)
            left_out = max(
                0.0, float(np.einsum("ij,ij->", centred, centred, dtype=np.float64)) / len(v) - kept
            )
        expected = np.atleast_2d(self.rotation_.variances_)[classes]
        return Spectrum(expected, variances, counts[classes] / len(v), energy, left_out)

    def with_step(self, x: Any, step: float) -> PolarQuantizer:
        """The same quantizer with another trellis step, its model learned anew from rows x."""
        if self.fine != "trellis":
            raise InputError(f"expected a quantizer with a trellis, this one has {self.fine!r}")
        return self._with(x, step, None)

    def with_bits(self, x: Any, bits: float) -> PolarQuantizer:
        """The same frame with a fine stage of another rate, ``bits`` per float, learned from rows
        x."""
        if self.fine not in (*SIZED, "trellis"):
            raise InputError(f"expected a fine stage of any rate, this one is {self.fine!r}")
        if not (isinstance(bits, int | float | np.number) and 0 < bits <= 32):
            raise InputError(f"expected bits in (0, 32], got {bits!r}")
        return self._with(x, None, bits)

    def _with(self, x: Any, step: float | None, bits: float | None) -> PolarQuantizer:
        self._check_fitted()
        other = copy.copy(self)
        other.step, other.bits = step, bits
        rows = as_matrix(x, d=self.d_)
        rows = rows[:: max(1, len(rows) // ENCODE_ROWS)]
        v = self._scale(rows)
        if self.radius_ is not None:
            v = self._split(v)[1]
        row_class, c = self.rotation_.analyse(v)
        other._fit_fine(c, row_class)
        other._note_usual_error(rows)
        return other

    def _note_usual_error(self, rows: Array) -> None:
        """Hold decoded numbers within walls where that helps, and remember the relative distortion
        of training rows, for ``drift``."""
        few = rows[:: max(1, len(rows) // DRIFT_ROWS)]
        for name, wall in zip(("low_", "high_"), self._walls, strict=True):
            if wall is not None:
                setattr(self, name, None)
                without = self._relative_distortion(few)
                setattr(self, name, wall)
                if not self._relative_distortion(few) < WORTH_HOLDING * without:
                    setattr(self, name, None)
        self.usual_error_ = float(f"{self._relative_distortion(few):.3g}")

    def _relative_distortion(self, rows: Array) -> float:
        """sum |x - x_hat|^2 / sum |x|^2, outliers and all, free of overflow."""
        v = self._scale(rows).astype(np.float64)
        decoded = self._decode_block(self._encode_block(rows), None)
        energy = float(np.einsum("ij,ij->", v, v))
        error = v - decoded
        return float(np.einsum("ij,ij->", error, error)) / energy if energy else 0.0

    def drift(self, x: Any) -> float:
        """How much worse rows x (n, d) fit than the training rows did: their distortion relative to
        their energy, divided by that of the training rows. Near 1 is as usual. O(encode + decode).
        """
        self._check_fitted()
        rows = as_matrix(x, d=self.d_)
        error = self._relative_distortion(rows) if len(rows) else self.usual_error_
        return error / self.usual_error_ if self.usual_error_ else (1.0 if not error else np.inf)

    def report(self) -> dict[str, Any]:
        """What was chosen and what it costs: stages, code bits, side bytes, and the candidates that
        the planner tried: of each its settings, the bits per float asked for and taken (with side
        bytes where these are paid for), the quality predicted (of the code ideal for its frame) and
        measured, with half its 95% confidence interval, and whether it was chosen.
        ``polarpack.comparison.plot_report`` draws them."""
        self._check_fitted()
        own = self.own_model
        fixed = np.log2(self.alphabet_sizes[: self.n_fields - (own.n_fields if own else 0)])
        return {
            "d": self.d_,
            "n_fields": self.n_fields,
            "stages": {name: stage.get_config() for name, stage in self._stages()},
            "layout": self.layout,
            "fixed_bits_per_row": float(fixed.sum()),
            "side_bytes": len(self.to_bytes()),
            "relative_distortion": self.usual_error_,
            "candidates": self.candidates,
        }

    @property
    def own_model(self) -> MagnitudeModel | None:
        """The entropy model that belongs to the quantizer: a trellis searches with it. It codes the
        last columns; None where a codec is free to choose."""
        return self.fine_.model if self.fine == "trellis" and self.fine_ is not None else None

    def rate_bits(self, codes: Array) -> float:
        """Bits that codes (n, n_fields) cost: ideal length under the own model, the logarithm of
        the alphabet for other columns (an entropy coder may do better there)."""
        own, n = self.own_model, len(codes)
        k = self.n_fields - (own.n_fields if own else 0)
        bits = n * float(np.log2(self.alphabet_sizes[:k]).sum())
        return bits + (own.rate_bits(np.asarray(codes)[:, k:]) if own else 0.0)

    def _fit_rotation(self, v: Float32, common: Rotation | None, n_rounds: int) -> None:
        if not isinstance(self.rotation, str):
            self.rotation_ = _given_rotation(self.rotation, v, self.center)
            return
        in_order = self.fine == "trellis" and self.n_classes == 1
        self.rotation_ = common or Rotation(
            cast(Any, self.rotation),
            center=self.center,
            n_components=self.n_components,
            exponent=self.rotation_exponent,
            for_trellis=in_order,
            seed=self.seed,
        ).fit(v)
        if self.n_classes > 1:
            noise = water_level(self.rotation_.variances_, (self.bits or 2.0) * self.d_)
            frames = Frames(
                self.rotation_, n_classes=self.n_classes, n_leading=self.n_leading, seed=self.seed
            )
            self.rotation_ = frames.fit(v, noise=noise, n_rounds=n_rounds)

    def _fit_fine(self, c: Float32, row_class: Int64) -> None:
        row_bits = None if self.bits is None else self.bits * self.d_
        if row_bits is not None and self.layout == "rows":  # where each row is so many bytes
            row_bits = max(8.0, row_bits + 1e-9 - (row_bits + 1e-9) % 8)
        row_bits = None if row_bits is None else row_bits - self.radius_bits
        if self.fine == "trellis":
            trellis = TrellisQuantizer(
                n_states=self.n_states, step=self.step, rate_weight=self.rate_weight
            )
            self.fine_ = trellis.fit(c, row_class, self.n_classes, row_bits=row_bits)
        elif self.fine == "bitshift":
            assert row_bits is not None  # the constructor insists
            self.fine_ = BitshiftQuantizer(state_bits=self.state_bits).fit(
                c, row_class, self.n_classes, row_bits=row_bits, seed=self.seed
            )
        elif self.fine == "codebook":
            self.fine_ = ProductResidualQuantizer(
                self._heads(c, row_bits),
                beam=self.beam,
                spherical_first=self.spherical,
                seed=self.seed,
            ).fit(c)
        elif self.fine == "grid":
            self.fine_ = GridQuantizer(n_bits=self.scalar_bits).fit(c)
        elif self.fine == "lloyd":
            few = c[:: max(1, c.size // (1 << 20))]
            self.fine_ = ScalarQuantizer(n_bits=self.scalar_bits).fit(np.ravel(few))

    def _heads(self, c: Float32, row_bits: float | None) -> list[tuple[int, int, tuple[int, ...]]]:
        """Slices of coefficients (n, m) with the bits of their stages."""
        m = c.shape[1]
        if row_bits is None:
            heads, n_bits = min(self.heads, m), self.n_codewords.bit_length() - 1
            edges = [m * i // heads for i in range(heads + 1)]
            return [(a, b, (n_bits,) * self.stages) for a, b in pairwise(edges)]
        total = max(1, int(np.floor(row_bits + 1e-9)))
        if isinstance(self.rotation, str) and self.rotation == "klt":
            from .residual import allocate_bits

            variances = self.rotation_.variances_
            if not len(variances):  # a file does not tell
                variances = np.einsum("ij,ij->j", c, c, dtype=np.float64) / len(c)
            return allocate_bits(variances, total, max_bits=self.n_codewords.bit_length() - 1)
        most = self.n_codewords.bit_length() - 1
        heads = min(m, -(-total // (most * self.stages)))
        heads = max(1, heads)
        edges = [m * i // heads for i in range(heads + 1)]
        share = [total * (i + 1) // heads - total * i // heads for i in range(heads)]
        return [
            (a, b, _even_split(bits, self.stages, most))
            for a, b, bits in zip(edges, edges[1:], share, strict=False)
        ]

    # -- shapes -------------------------------------------------------------------------------
    @property
    def is_fitted(self) -> bool:
        """Whether ``fit`` (or a file) has filled the stages."""
        return self.d_ > 0

    @property
    def alphabet_sizes(self) -> Int64:
        """(n_fields,) number of values of each code column."""
        self._check_fitted()
        radius = [self.radius_.alphabet_sizes] if self.radius_ is not None else []
        return np.concatenate([*radius, self._fine_alphabets()]).astype(np.int64)

    def _fine_alphabets(self) -> Int64:
        m = self.rotation_.n_components_
        if self.fine == "trellis":
            return cast(Int64, self.fine_.model.alphabet_sizes)
        if self.fine == "float16":
            return np.full(m, 1 << 16, np.int64)
        if self.fine == "lloyd":
            return np.repeat(self.fine_.alphabet_sizes, m)
        return cast(Int64, self.fine_.alphabet_sizes)

    @property
    def n_fields(self) -> int:
        """Number of code columns."""
        return len(self.alphabet_sizes)

    def _check_fitted(self) -> None:
        if not self.d_:
            raise NotFittedError("PolarQuantizer is not fitted: call fit first")

    # -- rows <-> codes -----------------------------------------------------------------------
    def encode(self, x: Any, *, row_weights: npt.ArrayLike | None = None) -> Any:
        """Rows (n, d) of any float dtype -> codes (n, n_fields), uint8 or uint16, in x's library.

        row_weights: (n,) as in ``fit``, for a quantizer fitted with them; None: all 1.
        Memory beyond the codes is bounded by a block of rows. Raises NotFittedError, or InputError
        for another width or rows that are not finite.
        """
        self._check_fitted()
        if is_torch(x) and x.is_cuda and self.fine == "codebook":
            from ._cuda import encode

            return encode(self, x)
        rows = as_matrix(x, d=self.d_)
        sizes = self.alphabet_sizes
        factors = None
        if row_weights is not None:
            if self.radius_norm != "given":
                raise InputError("row_weights= needs a quantizer that was fitted with row_weights=")
            factors = _row_factors(row_weights, len(rows))
        codes = np.empty(
            (len(rows), len(sizes)), np.uint8 if sizes.max(initial=1) <= 256 else np.uint16
        )
        # a trellis goes all the way with a few rows, which stay in the cache, and in each thread;
        # searches in codebooks and bitshift codes spread fewer rows over threads
        step = BLOCK_ROWS if self.fine == "trellis" else ENCODE_ROWS

        def encode_some(start: int) -> None:
            block = slice(start, start + step)
            codes[block] = self._encode_block(
                rows[block], None if factors is None else factors[block]
            )

        starts = range(0, len(rows), step)
        if self.fine == "trellis":
            in_threads(encode_some, starts)
        else:
            for start in starts:
                encode_some(start)
        return returner(x)(codes)

    def _encode_block(self, rows: Array, factors: Float32 | None = None) -> Array:
        v = self._scale(rows)
        parts: list[Array] = []
        if self.radius_ is not None:
            radius, v = self._split(v, factors)
            parts.append(self.radius_.encode(radius).reshape(-1, 1))
        row_class, c = self.rotation_.analyse(v)
        if self.fine in SEARCHED:
            parts.append(self.fine_.encode(c, row_class))
        elif self.fine == "float16":
            parts.append(np.clip(c, -65504, 65504).astype(np.float16).view(np.uint16))
        elif self.fine == "lloyd":
            parts.append(self.fine_.encode(c.ravel()).reshape(c.shape))
        else:
            parts.append(self.fine_.encode(c))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def decode(self, codes: Any, *, stages: int | None = None) -> Any:
        """Codes (n, n_fields) -> rows (n, d) float32, in the library of codes; the same bits on
        every machine. ``stages``: only the first residual stages. Values beyond float32 are held at
        its largest. Raises NotFittedError, or InputError for codes that fit no alphabet."""
        self._check_fitted()
        if is_torch(codes) and codes.is_cuda:
            from ._cuda import decode

            return decode(self, codes, stages=stages)
        c, back = enter_codes(codes, self.alphabet_sizes)
        return back(self.decode_as(c, np.dtype(np.float32), stages=stages))

    def decode_as(self, codes: Array, dtype: np.dtype[Any], *, stages: int | None = None) -> Array:
        """Like ``decode``, for checked numpy codes and straight to another float dtype. Rows go all
        the way in groups that stay in the cache, groups in parallel."""
        if len(codes) <= BLOCK_ROWS:
            return self._decode_group(codes, dtype, stages)
        rows = np.empty((len(codes), self.d_), dtype)

        def decode_some(start: int) -> None:
            group = slice(start, start + BLOCK_ROWS)
            rows[group] = self._decode_group(codes[group], dtype, stages)

        in_threads(decode_some, range(0, len(codes), BLOCK_ROWS))
        return rows

    def _decode_group(self, codes: Array, dtype: np.dtype[Any], stages: int | None) -> Array:
        # a quantizer from a file may say anything
        with np.errstate(over="ignore", invalid="ignore"):
            y = self._decode_block(codes, stages)
            if self.columns_ is not None:
                y = y * self.column_factors()
            if not self.exponent_:
                return y if dtype == np.float32 else _narrow(y, dtype)
            return _narrow(np.ldexp(y.astype(np.float64), self.exponent_), dtype)

    def _decode_block(self, codes: Array, stages: int | None) -> Float32:
        radius = None
        if self.radius_ is not None:
            radius = self.radius_.decode(codes[:, 0]).astype(np.float32)
            codes = codes[:, 1:]
        if self.fine in SEARCHED:
            row_class, lattice = self.fine_.decode(codes)
            y = self.rotation_.inverse(lattice, self.fine_.step_, row_class)
        else:
            y = self._rotate_back(self.decode_fine(codes, stages))
        if radius is not None:
            y *= radius[:, None]
        # comparisons, which say of -0.0 and 0.0 the same on every machine
        if self.low_ is not None:
            y = np.where(y < self.low_, self.low_, y)
        if self.high_ is not None:
            y = np.where(y > self.high_, self.high_, y)
        return y

    def decode_fine(self, codes: Array, stages: int | None) -> Float32:
        """Codes of the fine stage alone, of fields that are independent, -> coefficients (n, m)."""
        if self.fine == "float16":
            halves = codes.astype(np.uint16).view(np.float16).astype(np.float32)
            return cast(Float32, np.nan_to_num(halves, nan=0.0, posinf=65504.0, neginf=-65504.0))
        if self.fine == "lloyd":
            return cast(Float32, self.fine_.decode(codes.ravel()).reshape(codes.shape))
        if self.fine == "grid":
            return cast(Float32, self.fine_.decode(codes))
        n_used = codes.shape[1]
        if stages is not None:
            n_used = self.fine_.fields_of_stages(min(stages, self.fine_.n_stages))
        dtype = np.uint8 if self.fine_.alphabet_sizes.max(initial=1) <= 256 else np.uint16
        return cast(Float32, self.fine_.sum_codewords(np.ascontiguousarray(codes, dtype), n_used))

    def _rotate_back(self, c: Float32) -> Float32:
        """Coefficients that are not integers already are put on a grid fine enough not to matter,
        so that the rotation is exact arithmetic here too."""
        if (
            self.rotation_.n_components_ == self.d_
            and cast(Rotation, self.rotation_).matrix_ is None
        ):
            rotation = cast(Rotation, self.rotation_)
            return c + rotation.mean_ if rotation.center else c
        unit = self.grid_unit()
        # classes go with stages whose coefficients are integers and do not come here
        return cast(Rotation, self.rotation_).inverse(np.rint(c * np.float32(1 / unit)), unit)

    def grid_unit(self) -> float:
        """Step of the grid that coefficients are put on before they are rotated back: a power of
        two that depends on the quantizer alone, not on a batch."""
        if self.fine == "codebook":
            top = self.fine_.largest_
        elif self.fine == "lloyd":
            top = float(np.abs(self.fine_.levels_).max())
        else:
            top = 1.0
        return float(2.0 ** (np.ceil(np.log2(max(top, 1e-30))) - GRID_BITS))

    # -- scale and radius ---------------------------------------------------------------------
    def _scale(self, rows: Array) -> Float32:
        """Rows / 2^e, columns weighted, in float32, outliers held at CLIP. (Undone at the end of
        ``decode``.)"""
        if rows.dtype == np.float32 and self.exponent_ == 0 and self.columns_ is None:
            wide: Array = rows
        else:
            with np.errstate(over="ignore"):
                wide = np.ldexp(rows.astype(np.float64), -self.exponent_)
                if self.columns_ is not None:
                    wide *= 1 / self.column_factors().astype(np.float64)
        if largest(wide) > float(CLIP):
            wide = np.clip(wide, -CLIP, CLIP)
        return np.ascontiguousarray(wide, np.float32)

    def column_factors(self) -> Float32:
        """2**(-columns_ / 8), of 16 significant bits, as integers make it: (d,)."""
        assert self.columns_ is not None
        octave, eighth = np.divmod(-self.columns_, STEPS)
        return np.ldexp(MANTISSAS[eighth].astype(np.float32), (octave - MANTISSA).astype(np.int32))

    def _split(self, v: Float32, factors: Float32 | None = None) -> tuple[Float32, Float32]:
        """Rows -> radius (n,) and direction (n, d); a zero row has radius 0 and direction 0.
        factors: (n,) of weighted rows, 1 for all if None."""
        if self.radius_norm == "given":
            assert self.radius_ is not None
            wanted = np.ones(len(v), np.float32) if factors is None else factors
            radius = _level_of(self.radius_, wanted)
            return radius, np.asarray(v / np.maximum(radius, 1e-30)[:, None], np.float32)
        if self.radius_norm == "max":
            radius = np.abs(v).max(axis=1).astype(np.float32)
        else:
            radius = np.sqrt(np.einsum("ij,ij->i", v, v, dtype=np.float64)).astype(np.float32)
        safe: Float32 = np.where(radius > 0, radius, np.float32(1))
        return radius, v / safe[:, None]

    # -- what travels in a file ---------------------------------------------------------------
    def _stages(self) -> Iterator[tuple[str, Any]]:
        if self.radius_ is not None:
            yield "radius", self.radius_
        yield "rotation", self.rotation_
        if self.fine_ is not None:
            yield "fine", self.fine_

    def get_config(self) -> dict[str, Any]:
        """What the stored arrays do not say, as JSON values."""
        self._check_fitted()
        config: dict[str, Any] = {"d": self.d_, "fine_kind": self.fine, "exponent": self.exponent_}
        if self.radius_norm != "l2":
            config["radius_norm"] = self.radius_norm
        if self.layout != "archive":
            config["layout"] = self.layout
        if self.columns_ is not None:
            config["columns"] = self.columns_.tolist()
        for name, limit in (("low", self.low_), ("high", self.high_)):
            if limit is not None:
                config[name] = float(limit)
        config["usual_error"] = self.usual_error_
        return config | {name: stage.get_config() for name, stage in self._stages()}

    def to_bytes(self) -> bytes:
        """The fitted quantizer: magic, version, CRC-32, JSON (deflated), then its arrays. Layout:
        docs/format.md. Two quantizers decode alike exactly if these bytes are equal."""
        config = self.get_config()
        listed, blobs = [], []
        for name, stage in self._stages():
            for key, array, coding, blob in self._coded_arrays(name, stage):
                listed.append(
                    [name, key, array.dtype.str[1:], list(array.shape), coding, len(blob)]
                )
                blobs.append(blob)
        text = json.dumps([config, listed], separators=(",", ":")).encode()
        head = zlib.compress(text, 9)
        body = len(head).to_bytes(4, "little") + head + b"".join(blobs)
        return MAGIC + bytes([VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body

    def _coded_arrays(self, name: str, stage: Any) -> list[tuple[str, Array, str, bytes]]:
        """Arrays of a stage by name, how each is stored, and its bytes. Those of a rotation, which
        are most of all, are kept: it is written with each tensor, and other rates share it."""
        if name == "rotation" and self._coded_rotation[0] is stage:
            return self._coded_rotation[1]
        coded = [(key, a, *_array_to_bytes(a)) for key, a in stage.arrays().items()]
        if name == "rotation":
            self._coded_rotation = stage, coded
        return coded

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> PolarQuantizer:
        """Inverse of ``to_bytes``. FormatError (its subclasses) on anything else."""
        data = bytes(data)
        if len(data) < 11 or data[:2] != MAGIC:
            raise CorruptDataError("quantizer: not a quantizer's bytes")
        if data[2] != VERSION:
            raise UnsupportedVersionError(
                f"quantizer: version {data[2]}, this reader knows {VERSION}"
            )
        if zlib.crc32(data[7:]) != int.from_bytes(data[3:7], "little"):
            raise CorruptDataError("quantizer: checksum does not match")
        size = int.from_bytes(data[7:11], "little")
        try:
            unpack = zlib.decompressobj()
            text = unpack.decompress(data[11 : 11 + size], MAX_CONFIG)
            if not unpack.eof or unpack.unused_data:
                raise CorruptDataError(
                    f"quantizer: settings cut short, trailed by bytes, or beyond {MAX_CONFIG} bytes"
                )
            config, listed = json.loads(text.decode())
            refuse_critical(config, "quantizer")
            arrays = _read_arrays(listed, data[11 + size :])
            with np.errstate(over="ignore", invalid="ignore"):
                return cls._from_parts(config, arrays)
        except FormatError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            ArithmeticError,
            RecursionError,
            zlib.error,
        ) as e:
            raise CorruptDataError(f"quantizer: {type(e).__name__}: {e}") from e

    @classmethod
    def _from_parts(
        cls, config: dict[str, Any], arrays: dict[str, dict[str, Array]]
    ) -> PolarQuantizer:
        fine = config["fine_kind"]
        d, exponent = config["d"], config["exponent"]
        if type(d) is not int or not 1 <= d <= MAX_D or type(exponent) is not int:
            raise CorruptDataError(f"quantizer: d = {d!r}, exponent = {exponent!r}")
        if abs(exponent) > MAX_EXPONENT or fine not in FINE_STAGES:
            raise CorruptDataError(f"quantizer: exponent {exponent} or fine stage {fine!r} unknown")
        norm = config.get("radius_norm", "l2")
        usual = config.get("usual_error", 0.0)
        if not isinstance(usual, int | float) or not usual >= 0:
            raise CorruptDataError(f"quantizer: usual_error {usual!r}")
        layout = config.get("layout", "archive")
        self = cls(fine=fine, step=1.0, bits=1.0, radius_norm=norm, radius_bits=0, layout=layout)
        self.usual_error_ = float(usual)
        columns = config.get("columns")
        if columns is not None:
            if len(columns) != d or not all(
                type(k) is int and abs(k) <= MAX_COLUMN_SCALE for k in columns
            ):
                raise CorruptDataError(f"quantizer: column scales do not fit d = {d}")
            self.columns_ = np.array(columns, np.int64)
        for side in ("low", "high"):
            limit = config.get(side)
            if limit is not None:
                if type(limit) not in (int, float) or not abs(limit) <= float(CLIP):
                    raise CorruptDataError(f"quantizer: {side} {limit!r}")
                setattr(self, f"{side}_", np.float32(limit))
        self.exponent_ = exponent
        if "radius" in config:
            self.radius_ = ScalarQuantizer.from_config(config["radius"]).load_arrays(
                arrays["radius"]
            )
            self.radius_bits = self.radius_.n_bits
        stored = arrays.get("rotation", {})
        if "common" in config["rotation"]:
            self.rotation_ = Frames.from_arrays(config["rotation"], stored, d)
            self.n_classes, self.n_leading = self.rotation_.n_classes, self.rotation_.n_leading
            self.rotation, self.center = "klt", self.rotation_.common.center
        else:
            self.rotation_ = Rotation.from_arrays(config["rotation"], stored, d)
            self.rotation, self.center = self.rotation_.kind, self.rotation_.center
        self._walls = self.low_, self.high_
        m = self.rotation_.n_components_
        if fine == "trellis":
            self.fine_ = TrellisQuantizer.from_arrays(config["fine"], arrays["fine"])
            self.n_states, self.rate_weight = self.fine_.n_states, self.fine_.rate_weight
            if not 0 < self.fine_.step_ < np.inf:
                raise CorruptDataError(f"quantizer: step {config['fine']['step']} beyond float32")
            model = self.fine_.model
            if (model.n_classes, model.expected.shape[1]) != (self.rotation_.n_classes, m):
                raise CorruptDataError(f"quantizer: trellis model does not fit {m} coefficients")
        elif fine == "bitshift":
            self.fine_ = BitshiftQuantizer.from_arrays(config["fine"], arrays["fine"])
            if self.fine_.log_scales_.shape != (self.rotation_.n_classes, m):
                raise CorruptDataError(f"quantizer: bitshift scales do not fit {m} coefficients")
            self.state_bits = self.fine_.state_bits
        elif fine != "float16":
            kind: dict[
                str,
                type[ProductResidualQuantizer] | type[GridQuantizer] | type[ScalarQuantizer],
            ] = {
                "codebook": ProductResidualQuantizer,
                "grid": GridQuantizer,
                "lloyd": ScalarQuantizer,
            }
            self.fine_ = kind[fine].from_config(config["fine"]).load_arrays(arrays["fine"])
            width: dict[str, Callable[[Any], int]] = {
                "codebook": lambda f: int(f.splits_[-1]),
                "grid": lambda f: f.n_fields,
                "lloyd": lambda f: m,
            }
            if width[fine](self.fine_) != m:
                raise CorruptDataError(f"quantizer: fine stage does not fit {m} coefficients")
            if isinstance(self.fine_, ProductResidualQuantizer):
                self.beam, self.spherical = self.fine_.beam, self.fine_.spherical_first
                self.heads, self.stages = len(self.fine_.heads), self.fine_.n_stages
                self.n_codewords = int(self.fine_.alphabet_sizes.max(initial=2))
            else:
                self.scalar_bits = cast(GridQuantizer | ScalarQuantizer, self.fine_).n_bits
        self.d_ = d
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of ``to_bytes``, hexadecimal: names the quantizer a file was written with."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def __repr__(self) -> str:
        if not self.d_:
            return f"PolarQuantizer(fine={self.fine!r}, not fitted)"
        radius = f"{self.radius_.n_bits}-bit radius, " if self.radius_ is not None else ""
        coefficients = f"{self.rotation_.n_components_} of {self.d_} coefficients"
        return f"PolarQuantizer({radius}{coefficients}, {self.fine})"


MAX_D = 1 << 16
MAX_EXPONENT = 1100  # of float64
MAX_COLUMN_SCALE = 12 * STEPS  # in eighths of an octave
MAX_ROW_SCALE = 12.0  # octaves
ROW_SCALE_BITS = 5


def refuse_critical(config: Any, where: str) -> None:
    """UnsupportedVersionError where an object of a file, or one within it, has a member whose name
    begins with a capital letter: what a later version may not have ignored (docs/format.md)."""
    if isinstance(config, dict):
        for name, value in config.items():
            if "A" <= name[:1] <= "Z":
                raise UnsupportedVersionError(f"{where}: needs {name!r:.60} of a later version")
            refuse_critical(value, where)


def _row_factors(weights: npt.ArrayLike, n: int) -> Float32:
    """What weighted rows are divided by, (n,): one over the roots of the weights relative to their
    geometric mean, within MAX_ROW_SCALE octaves of one."""
    w = check_weights(weights, f"row_weights of shape ({n},)")
    if len(w) != n:
        raise InputError(f"expected {n} row_weights, one for each row, got {len(w)}")
    octaves = np.full(n, -np.inf)
    octaves[w > 0] = 0.5 * np.log2(w[w > 0])
    octaves -= octaves[w > 0].mean() if (w > 0).any() else 0.0
    return np.asarray(np.exp2(-np.clip(octaves, -MAX_ROW_SCALE, MAX_ROW_SCALE)), np.float32)


def row_scale(weights: npt.ArrayLike, n: int) -> tuple[ScalarQuantizer, Float32]:
    """How codes tell the weights of n rows: at most 2^ROW_SCALE_BITS levels of ``_row_factors``,
    and the level of each row, (n,)."""
    factors = _row_factors(weights, n)
    bits = min(ROW_SCALE_BITS, len(np.unique(factors)).bit_length())  # level 0 is for zero
    scale = ScalarQuantizer(n_bits=max(1, bits), domain="log").fit(factors)
    return scale, _level_of(scale, factors)


def _level_of(scale: ScalarQuantizer, factors: Float32) -> Float32:
    """Levels that stand for factors, (n,), none of them zero."""
    return np.asarray(scale.decode(np.maximum(scale.encode(factors), 1)), np.float32)


def check_weights(
    weights: npt.ArrayLike, what: str = "weights of shape (d,)"
) -> npt.NDArray[np.float64]:
    """Weights as float64, of one axis; InputError unless finite, >= 0 and not all zero."""
    try:
        w = np.asarray(weights, np.float64)
    except (TypeError, ValueError) as e:
        raise InputError(f"expected {what} to be numbers: {e}") from None
    if w.ndim != 1 or not np.isfinite(w).all() or (w < 0).any() or (w.size and not w.any()):
        raise InputError(f"expected {what}, finite, >= 0 and not all zero, got shape {w.shape}")
    return w


def _column_scales(weights: npt.NDArray[np.float64], d: int) -> Int64:
    """Square roots of weights (d,) relative to their geometric mean, in eighths of an octave."""
    if weights.shape != (d,):
        raise InputError(f"expected {d} weights, one for each dimension, got {len(weights)}")
    most = weights > 0
    octaves = np.full(d, -np.inf)
    octaves[most] = 0.5 * np.log2(weights[most])
    octaves -= octaves[most].mean()
    steps = np.clip(np.rint(STEPS * octaves), -MAX_COLUMN_SCALE, MAX_COLUMN_SCALE)
    return cast(Int64, steps.astype(np.int64))


def _scale_exponent(rows: Array) -> int:
    """Exponent e for which rows / 2^e have a root mean square near one. O(n d), in float64."""
    top = largest(rows)
    if top == 0.0:
        return 0
    e = int(np.frexp(top)[1])
    total, step = 0.0, max(1, WIDE_FLOATS // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        block = np.ldexp(rows[start : start + step].astype(np.float64), -e)
        total += float(np.einsum("ij,ij->", block, block))
    e += int(np.frexp(np.sqrt(total / rows.size))[1])
    return 0 if abs(e) <= 6 and rows.dtype != np.float64 else e


def _walls(v: Float32) -> tuple[np.float32 | None, np.float32 | None]:
    """Least and largest of the numbers in v, where many come near: they then end there, like the
    zeros of a histogram. None where they thin out. O(n d)."""
    low, high = v.min(), v.max()
    near, often = (high - low) * np.float32(0.01), max(64, WALL_SHARE * v.size)
    return (
        low if np.count_nonzero(v <= low + near) >= often else None,
        high if np.count_nonzero(v >= high - near) >= often else None,
    )


def _narrow(y: Array, dtype: np.dtype[Any]) -> Array:
    """y in another float dtype, held at its largest finite value instead of overflowing."""
    if y.dtype != np.float32 or dtype == np.float16:
        limit = float(np.finfo(dtype).max)
        y = np.clip(y, -limit, limit)
    return y.astype(dtype)


def _even_split(bits: int, stages: int, most: int) -> tuple[int, ...]:
    """bits over as few stages as ``most`` bits each allow, at most ``stages``, evenly."""
    n = min(stages, max(1, -(-bits // most)))
    share = [bits * (i + 1) // n - bits * i // n for i in range(n)]
    return tuple(sorted((b for b in share if b), reverse=True))


def _given_rotation(axes: npt.NDArray[Any], v: Float32, center: bool) -> Rotation:
    """A rotation with the caller's orthogonal axes."""
    d = v.shape[1]
    axes = np.asarray(axes, np.float64)
    if axes.shape != (d, d) or not np.allclose(axes.T @ axes, np.eye(d), atol=1e-3):
        raise InputError(
            f"expected rotation to be an orthogonal ({d}, {d}) matrix, got {axes.shape}"
        )
    exponent = int(np.ceil(np.log2(np.sqrt(d) / 0.15)))
    mean = v.mean(axis=0, dtype=np.float64) if center else np.zeros(d)
    rounded = mean.astype(np.float16).astype(np.float32)
    return Rotation.of(np.rint(axes * 2.0**exponent).astype(np.int16), exponent, rounded)


def _array_to_bytes(a: Array) -> tuple[str, bytes]:
    """An array -> how it is stored, and its bytes: int16 matrices through the range coder."""
    if a.dtype == np.int16 and a.ndim == 2 and a.size:
        coded = integers_to_bytes(np.ascontiguousarray(a))
        if len(coded) < a.nbytes:
            return "integers", coded
    return "raw", np.ascontiguousarray(a, a.dtype.newbyteorder("<")).tobytes()


def _array_from_bytes(coding: str, dtype: str, shape: list[int], blob: bytes) -> Array:
    """Inverse of ``_array_to_bytes``, for a dtype and shape that were checked."""
    if coding == "integers" and dtype == "i2" and len(shape) == 2:
        return integers_from_bytes(blob, (shape[0], shape[1]))
    if coding != "raw" or len(blob) != int(dtype[1:]) * int(np.prod(shape)):
        raise CorruptDataError(
            f"quantizer: array of {shape} {dtype} does not fit {len(blob)} bytes"
        )
    native = np.frombuffer(blob, "<" + dtype).astype(np.dtype(dtype))
    return native.reshape(shape)


def _read_arrays(listed: list[Any], data: bytes) -> dict[str, dict[str, Array]]:
    """The arrays of ``to_bytes`` by stage and name; nothing is allocated before it is checked."""
    arrays: dict[str, dict[str, Array]] = {}
    at = 0
    for stage, key, dtype, shape, coding, length in listed:
        if dtype not in ("f2", "f4", "f8", "i2", "i4", "i8", "u1", "u2", "u4"):
            raise CorruptDataError(f"quantizer: array {stage}.{key} of dtype {dtype!r}")
        sizes_fit = all(type(v) is int and 0 <= v <= MAX_ARRAY for v in [*shape, length])
        if not sizes_fit or len(shape) > 3:
            raise CorruptDataError(f"quantizer: array {stage}.{key} of shape {shape}")
        n_bytes = int(dtype[1:])
        for v in shape:
            n_bytes *= v
        if n_bytes > MAX_ARRAY:
            raise LimitError(
                f"quantizer: array {stage}.{key} of {n_bytes} bytes exceeds {MAX_ARRAY}"
            )
        # coded integers shrink at most to the model's smallest cost of 1/700 bit each
        if at + length > len(data) or n_bytes > max(4096, 8192 * length):
            raise CorruptDataError(f"quantizer: array {stage}.{key} declares more than is there")
        blob = data[at : at + length]
        arrays.setdefault(stage, {})[key] = _array_from_bytes(coding, dtype, shape, blob)
        at += length
    if at != len(data):
        raise CorruptDataError(f"quantizer: {len(data) - at} bytes after the last array")
    return arrays
