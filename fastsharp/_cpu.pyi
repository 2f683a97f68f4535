"""Types of the compiled module `fastsharp._cpu`; addresses are ints that `_border.py` has checked (0: not there)."""

def alpha_f32(
    E: int,
    n: int,
    v: int,
    v_member: int,
    w: int,
    w_member: int,
    out: int,
    out_member: int,
    work: int,
    threads: int,
) -> None: ...

alpha_f64 = alpha_f32

def dots_f32(
    E: int,
    b: int,
    j: int,
    n: int,
    V: int,
    V_member: int,
    V_row: int,
    w: int,
    w_member: int,
    w_row: int,
    ab: int,
    ab_member: int,
    last: int,
    last_member: int,
    before: int,
    before_member: int,
    out: int,
    out_member: int,
    out_row: int,
    work: int,
    threads: int,
) -> None: ...

dots_f64 = dots_f32
dots_f16 = dots_f32
dots_bf16 = dots_f32

def update_f32(
    E: int,
    b: int,
    j: int,
    n: int,
    V: int,
    V_member: int,
    V_row: int,
    w: int,
    w_member: int,
    w_row: int,
    c: int,
    c_member: int,
    c_row: int,
    row: int,
    row_member: int,
    factor: int,
    factor_member: int,
    out: int,
    out_member: int,
    out_row: int,
    work: int,
    threads: int,
) -> None: ...

update_f64 = update_f32
update_f16 = update_f32
update_bf16 = update_f32

def combine_f32(C: int, ldc: int, k: int, V: int, ldv: int, j: int, n: int, X: int, ldx: int, threads: int) -> None: ...

combine_f64 = combine_f32
combine_f16 = combine_f32
combine_bf16 = combine_f32

def probes_f32(kind: int, seed: int, first: int, out: int, ldo: int, b: int, n: int, threads: int) -> None: ...

probes_f64 = probes_f32

def mlp_tile_size_f32(net: tuple[int, ...]) -> int: ...

mlp_tile_size_f64 = mlp_tile_size_f32

def mlp_workspace_size_f32(net: tuple[int, ...], rows: int, threads: int) -> int: ...

mlp_workspace_size_f64 = mlp_workspace_size_f32

def mlp_product_f32(
    net: tuple[int, ...], gauss: bool, prepared: tuple[int, ...], rows: tuple[int | float, ...], work: int, threads: int
) -> None: ...

mlp_product_f64 = mlp_product_f32

def activation_prepare_f32(
    curve: tuple[int, float, float, float],
    sizes: tuple[int, ...],
    x: tuple[int, ...],
    bias: int,
    d1: tuple[int, ...],
    d2: tuple[int, ...],
    threads: int,
) -> None: ...
def activation_tangent_f32(
    sizes: tuple[int, ...], d1: tuple[int, ...], x_t: tuple[int, ...], bias_t: tuple[int, ...], out: tuple[int, ...], threads: int
) -> None: ...
def activation_adjoint_f32(
    sizes: tuple[int, ...],
    d1: tuple[int, ...],
    y_gt: tuple[int, ...],
    q: tuple[int, ...],
    a_t: tuple[int, ...],
    out: tuple[int, ...],
    bias_gt: tuple[int, ...],
    work: int,
    threads: int,
) -> None: ...
def norm_prepare_f32(sizes: tuple[int, ...], x: tuple[int, ...], eps: float, center: bool, stats: int, threads: int) -> None: ...
def norm_tangent_f32(
    sizes: tuple[int, ...],
    norm: tuple[tuple[int, ...], int, int, bool],
    x_t: tuple[int, ...],
    w_t: tuple[int, ...],
    bias_t: tuple[int, ...],
    out: tuple[int, ...],
    sums: int,
    threads: int,
) -> None: ...
def norm_adjoint_f32(
    sizes: tuple[int, ...],
    norm: tuple[tuple[int, ...], int, int, bool],
    y_gt: tuple[int, ...],
    second: tuple[tuple[int, ...], int, tuple[int, ...], int, tuple[int, ...]],
    out: tuple[int, ...],
    sums: int,
    w_gt: tuple[int, ...],
    bias_gt: tuple[int, ...],
    work: int,
    threads: int,
) -> None: ...
def softmax_gradient_f32(
    sizes: tuple[int, ...],
    z: tuple[int, ...],
    target: int,
    weight: int,
    smoothing: float,
    p: tuple[int, ...],
    g: tuple[int, ...],
    threads: int,
) -> None: ...
def softmax_product_f32(
    sizes: tuple[int, ...], p: tuple[int, ...], weight: int, u: tuple[int, ...], out: tuple[int, ...], threads: int
) -> None: ...

activation_prepare_f64 = activation_prepare_f32
activation_tangent_f64 = activation_tangent_f32
activation_adjoint_f64 = activation_adjoint_f32
norm_prepare_f64 = norm_prepare_f32
norm_tangent_f64 = norm_tangent_f32
norm_adjoint_f64 = norm_adjoint_f32
softmax_gradient_f64 = softmax_gradient_f32
softmax_product_f64 = softmax_product_f32

def activation_workspace(sizes: tuple[int, ...]) -> int: ...
def norm_workspace(sizes: tuple[int, ...]) -> int: ...
def workspace_size(E: int, b: int, n: int, j: int) -> int: ...
def read_stream_f32(x: int, n: int, out: int, work: int, threads: int) -> None: ...
def read_stream_f64(x: int, n: int, out: int, work: int, threads: int) -> None: ...
def simd() -> str: ...
def simd_supported() -> str: ...
def set_simd(level: str) -> bool: ...
def openmp() -> str: ...
def cuda_status() -> str: ...
def stub() -> int: ...
