//! Mixtures of experts of a program: their matrices as one table on the device. Knows no kernel.

use super::driver::DevicePtr;
use super::launch::mixture::{ExpertTable, Mixture, SharedExpert};
use super::load::Part;
use super::weights::DeviceMatrix;
use crate::device::DeviceError;
use crate::program::{ExpertSpec, MixtureSpec, WeightId};

/// Bytes of a mixture's tables of addresses.
pub(super) fn table_bytes(spec: &MixtureSpec) -> usize {
    2 * spec.experts.len() * size_of::<DevicePtr>()
}

/// A mixture whose tables lie at `table`, and what is to be written there.
pub(super) fn mixture(
    spec: &MixtureSpec,
    matrices: &[Vec<Part>],
    table: DevicePtr,
) -> Result<(Mixture, Vec<DevicePtr>), DeviceError> {
    let one = |weight: WeightId| match matrices[weight.index()][..] {
        [part] => Ok(part.matrix),
        _ => Err(unsupported("a matrix in several formats")),
    };
    let count = spec.experts.len();
    let mut addresses = Vec::with_capacity(2 * count);
    let mut experts = |matrix: fn(&ExpertSpec) -> WeightId| {
        let at = table.offset(addresses.len() * size_of::<DevicePtr>());
        let all: Vec<DeviceMatrix> = spec
            .experts
            .iter()
            .map(|expert| one(matrix(expert)))
            .collect::<Result<_, _>>()?;
        let first = all[0];
        let same = |other: &DeviceMatrix| {
            (other.format, other.rows, other.width) == (first.format, first.rows, first.width)
        };
        if !all.iter().all(same) {
            return Err(unsupported("experts that differ in format or shape"));
        }
        addresses.extend(all.iter().map(|matrix| matrix.at));
        Ok(ExpertTable {
            addresses: at,
            matrix: first,
            count: count as u32,
        })
    };
    let (gate_up, down) = (experts(|expert| expert.gate_up)?, experts(|expert| expert.down)?);
    let shared = spec.shared.map(|shared| {
        Ok(SharedExpert {
            gate_up: one(shared.gate_up)?,
            down: one(shared.down)?,
            gate: spec.shared_gate.map(one).transpose()?,
        })
    });
    let mixture = Mixture {
        router: one(spec.router)?,
        gate_up,
        down,
        top_k: spec.top_k,
        normalisation: spec.normalisation,
        function: spec.function,
        shared: shared.transpose()?,
    };
    Ok((mixture, addresses))
}

fn unsupported(what: &str) -> DeviceError {
    DeviceError::Unsupported {
        device: "cuda",
        op: format!("a mixture of experts with {what}"),
    }
}
