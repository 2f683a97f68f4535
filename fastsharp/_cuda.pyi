"""Types of the compiled module `fastsharp._cuda`; addresses are ints that `_border.py` has checked (0: not there), `stream` is a cudaStream_t."""

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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
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
    device: int,
    stream: int,
) -> None: ...

update_f64 = update_f32
update_f16 = update_f32
update_bf16 = update_f32

def combine_f32(C: int, ldc: int, k: int, V: int, ldv: int, j: int, n: int, X: int, ldx: int, device: int, stream: int) -> None: ...

combine_f64 = combine_f32
combine_f16 = combine_f32
combine_bf16 = combine_f32

def probes_f32(kind: int, seed: int, first: int, out: int, ldo: int, b: int, n: int, device: int, stream: int) -> None: ...

probes_f64 = probes_f32

def mlp_tile_size_f32(net: tuple[int, ...]) -> int: ...

mlp_tile_size_f64 = mlp_tile_size_f32

def mlp_workspace_size_f32(net: tuple[int, ...], rows: int, device: int, stream: int) -> int: ...

mlp_workspace_size_f64 = mlp_workspace_size_f32

def mlp_product_f32(
    net: tuple[int, ...], gauss: bool, cache: int, theta: int, rows: tuple[int, ...], work: int, device: int, stream: int
) -> None: ...

mlp_product_f64 = mlp_product_f32

def workspace_size(E: int, b: int, n: int, j: int) -> int: ...
def stub() -> int: ...
