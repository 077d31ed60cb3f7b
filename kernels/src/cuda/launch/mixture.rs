//! Which kernels run a mixture of experts. Nothing of a step's routing comes back to the host.

use galerne_core::graph::{Activation, RouterNormalisation};

use super::elementwise::{Elementwise, elementwise};
use super::linear::{self, Linear, Means, gated, linear};
use super::linear_small::{COUNTERS_BYTES, is_gated};
use super::moe_combine::moe_combine;
use super::moe_exact::moe_exact;
use super::moe_linear::moe_linear;
use super::moe_plan::{Tiling, moe_plan};
use super::moe_route::moe_route;
use crate::cuda::driver::{DevicePtr, DeviceView, Launch};
use crate::cuda::weights::DeviceMatrix;
use crate::device::Precision;

/// Matrices of all experts, of one format and shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertTable {
    /// `[count]` u64 on the device: where each expert's matrix lies.
    pub addresses: DevicePtr,
    /// Format and shape of each; its own address is not used.
    pub matrix: DeviceMatrix,
    /// Experts.
    pub count: u32,
}

/// The feed-forward every row passes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// `[2 * ffn, width]`
    pub gate_up: DeviceMatrix,
    /// `[width, ffn]`
    pub down: DeviceMatrix,
    /// `[1, width]`: the output counts by the sigmoid of this map.
    pub gate: Option<DeviceMatrix>,
}

/// A mixture of experts: see [`crate::program::MixtureSpec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mixture {
    /// `[experts, width]`
    pub router: DeviceMatrix,
    /// `[2 * ffn, width]` each: gate rows, then up rows.
    pub gate_up: ExpertTable,
    /// `[width, ffn]` each.
    pub down: ExpertTable,
    /// Experts per row.
    pub top_k: u32,
    /// How scores become weights.
    pub normalisation: RouterNormalisation,
    /// The experts' activation.
    pub function: Activation,
    /// An expert every row passes through.
    pub shared: Option<SharedExpert>,
}

/// Where a mixture's intermediate results lie, all of them but what linear maps need, which comes first.
#[derive(Debug, Clone, Copy)]
struct Workspace {
    chosen: DevicePtr,
    weights: DevicePtr,
    order: DevicePtr,
    tiles: DevicePtr,
    inner: DeviceView,
    y: DeviceView,
    shared_inner: DeviceView,
    shared_y: DeviceView,
    gate: DeviceView,
    end: DevicePtr,
}

impl Workspace {
    fn new(mixture: &Mixture, rows: u32, at: DevicePtr) -> Self {
        let mut end = at.offset(linear_bytes(mixture, rows));
        let mut take = |numbers: usize| {
            let at = end;
            end = end.offset((numbers * 4).next_multiple_of(256));
            at
        };
        let assignments = rows * mixture.top_k;
        let count = assignments as usize;
        // As if all tiles were small: what is needed must not shrink when rows are more.
        let tiles = mixture.router.rows as usize + count / 8;
        let mut matrix = |rows: u32, width: u32| DeviceView {
            at: take(rows as usize * width as usize),
            stride: width,
            width,
        };
        let inner = matrix(assignments, mixture.gate_up.matrix.rows);
        let y = matrix(assignments, mixture.down.matrix.rows);
        let shared = mixture.shared.map_or(0, |shared| shared.gate_up.rows);
        let shared_inner = matrix(rows, shared);
        let shared_y = matrix(rows, mixture.shared.map_or(0, |shared| shared.down.rows));
        let gate = matrix(rows, 1);
        Self {
            chosen: take(count),
            weights: take(count),
            order: take(count),
            tiles: take(3 * tiles),
            inner,
            y,
            shared_inner,
            shared_y,
            gate,
            end,
        }
    }
}

/// Of the shared expert's maps; the counters at the beginning stay as they are in any case.
fn linear_bytes(mixture: &Mixture, rows: u32) -> usize {
    let maps = mixture
        .shared
        .iter()
        .flat_map(|shared| [shared.gate_up, shared.down]);
    let most = maps.map(|matrix| linear::workspace_bytes(&matrix, rows)).max();
    most.unwrap_or(COUNTERS_BYTES).next_multiple_of(256)
}

/// Bytes of workspace that [`mixture`] needs for at most `rows_max` rows. It may be the one of [`linear`](mod@super::linear), which is
/// zeroed once.
#[must_use]
pub fn workspace_bytes(mixture: &Mixture, rows_max: u32) -> usize {
    Workspace::new(mixture, rows_max, DevicePtr::NULL).end.0 as usize
}

/// `out` = the mixture of `x`, both `[rows, width]`. `sequence_of` is `[rows]` u32, 0xffffffff for rows that are only padding,
/// which go through no expert, or [`DevicePtr::NULL`].
#[must_use]
pub fn mixture(
    mixture: &Mixture,
    (x, out): (DeviceView, DeviceView),
    (rows, sequence_of): (u32, DevicePtr),
    means: Means,
    workspace: DevicePtr,
) -> Vec<Launch> {
    let space = Workspace::new(mixture, rows, workspace);
    let choice = (mixture.top_k, mixture.normalisation);
    let mut launches = vec![moe_route(
        (x, mixture.router),
        sequence_of,
        (space.chosen, space.weights),
        choice,
        rows,
    )];
    launches.extend(experts(mixture, x, rows, means.precision, &space));
    let mut shared = (DeviceView::NONE, DevicePtr::NULL);
    if let Some(expert) = &mixture.shared {
        launches.extend(shared_expert(
            expert,
            mixture.function,
            x,
            rows,
            means,
            (&space, workspace),
        ));
        let gate = if expert.gate.is_some() {
            space.gate.at
        } else {
            DevicePtr::NULL
        };
        shared = (space.shared_y, gate);
    }
    let chosen = (space.chosen, space.weights, mixture.top_k);
    launches.push(moe_combine(space.y, chosen, shared, out, rows));
    launches
}

fn halves(both: DeviceView) -> (DeviceView, DeviceView) {
    let width = both.width / 2;
    let up = DeviceView {
        at: both.at.offset(width as usize * 4),
        width,
        ..both
    };
    (DeviceView { width, ..both }, up)
}

fn experts(
    mixture: &Mixture,
    x: DeviceView,
    rows: u32,
    precision: Precision,
    space: &Workspace,
) -> Vec<Launch> {
    let tiling = Tiling::new(rows * mixture.top_k, mixture.router.rows);
    let (gate, up) = halves(space.inner);
    let function = mixture.function;
    let activate = elementwise(
        Elementwise::ActivateMul(function),
        gate,
        up,
        gate,
        tiling.assignments,
    );
    if precision == Precision::F32 {
        let chosen = (space.chosen, tiling.assignments);
        return vec![
            moe_exact((x, mixture.top_k), &mixture.gate_up, chosen, space.inner),
            activate,
            moe_exact((gate, 1), &mixture.down, chosen, space.y),
        ];
    }
    let plan = (space.order, space.tiles);
    let map = |x, experts, out| moe_linear(x, experts, plan, tiling, out);
    let mut launches = vec![moe_plan(space.chosen, plan, tiling)];
    if is_gated(&mixture.gate_up.matrix) {
        launches.push(map((x, mixture.top_k), (&mixture.gate_up, Some(function)), gate));
    } else {
        launches.extend([
            map((x, mixture.top_k), (&mixture.gate_up, None), space.inner),
            activate,
        ]);
    }
    launches.push(map((gate, 1), (&mixture.down, None), space.y));
    launches
}

fn shared_expert(
    expert: &SharedExpert,
    function: Activation,
    x: DeviceView,
    rows: u32,
    means: Means,
    (space, workspace): (&Workspace, DevicePtr),
) -> Vec<Launch> {
    let map = |x, matrix, out| Linear {
        x,
        matrix,
        bias: DevicePtr::NULL,
        accumulate: false,
        out,
        rows,
    };
    let (gate, up) = halves(space.shared_inner);
    let mut launches = vec![];
    if let Some(launch) = gated(&map(x, expert.gate_up, gate), function, means, workspace) {
        launches.push(launch);
    } else {
        launches.extend(linear(
            &map(x, expert.gate_up, space.shared_inner),
            means,
            workspace,
        ));
        launches.push(elementwise(
            Elementwise::ActivateMul(function),
            gate,
            up,
            gate,
            rows,
        ));
    }
    launches.extend(linear(&map(gate, expert.down, space.shared_y), means, workspace));
    // One number per row decides over the whole expert: exact, like the router.
    let gate = expert.gate.map(|matrix| map(x, matrix, space.gate));
    let exact = Means {
        precision: Precision::F32,
        ..means
    };
    launches.extend(gate.iter().flat_map(|map| linear(map, exact, workspace)));
    launches
}
