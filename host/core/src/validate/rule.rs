//! One node under test: its inputs, numbers and weights, each fetched with its check. Must not know any op's contract.

use crate::graph::{Op, Rows, ValueShape};
use crate::ids::NodeId;
use crate::weights::WeightInfo;

use super::rules::Gate;
use super::{GraphError, Site};

/// The range of a real attribute.
#[derive(Clone, Copy)]
pub(super) enum Range {
    Finite,
    NotNegative,
    Positive,
}

impl Range {
    fn holds(self, value: f32) -> bool {
        value.is_finite()
            && match self {
                Self::Finite => true,
                Self::NotNegative => value >= 0.0,
                Self::Positive => value > 0.0,
            }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Finite => "to be finite",
            Self::NotNegative => "to be finite and not negative",
            Self::Positive => "to be finite and above 0",
        }
    }
}

/// One node under test, with what is known of the nodes before it.
#[derive(Clone, Copy)]
pub(super) struct Rule<'a> {
    pub(super) gate: &'a Gate<'a>,
    pub(super) node: NodeId,
    pub(super) op: &'a Op,
}

/// The shapes of inputs and values.
impl Rule<'_> {
    /// The shape of an input; `check_order` has seen that it exists.
    pub(super) fn shape(self, input: NodeId) -> ValueShape {
        self.gate.facts.shapes[input.index()]
    }

    pub(super) fn exactly(
        self,
        field: &'static str,
        input: NodeId,
        expected: ValueShape,
    ) -> Result<(), GraphError> {
        if self.shape(input) == expected {
            Ok(())
        } else {
            Err(self.input_shape(field, input, expected.to_string()))
        }
    }

    pub(super) fn tokens(self, field: &'static str, input: NodeId) -> Result<ValueShape, GraphError> {
        let shape = self.shape(input);
        if shape.rows == Rows::Tokens {
            Ok(shape)
        } else {
            Err(self.input_shape(field, input, "[tokens, heads, width]".to_owned()))
        }
    }

    pub(super) fn single_head(self, field: &'static str, input: NodeId) -> Result<ValueShape, GraphError> {
        let shape = self.shape(input);
        if shape.heads == 1 {
            Ok(shape)
        } else {
            Err(self.input_shape(
                field,
                input,
                "[rows, 1, width], as reshape-heads gives".to_owned(),
            ))
        }
    }

    pub(super) fn input_shape(self, field: &'static str, input: NodeId, expected: String) -> GraphError {
        GraphError::InputShape {
            at: self.site(),
            field,
            input,
            expected,
            got: self.shape(input),
        }
    }

    /// A value's shape, if its rows are within the limit.
    pub(super) fn value(self, rows: Rows, heads: u32, width: u64) -> Result<ValueShape, GraphError> {
        let got = width.saturating_mul(u64::from(heads));
        let max = self.gate.limits.row_elements_max.min(u64::from(u32::MAX));
        match u32::try_from(width) {
            Ok(width) if got <= max => Ok(ValueShape { rows, heads, width }),
            _ => Err(GraphError::RowElements {
                at: self.site(),
                max,
                got,
            }),
        }
    }
}

/// Numbers.
impl Rule<'_> {
    pub(super) fn number(self, field: &'static str, got: f32, range: Range) -> Result<(), GraphError> {
        if range.holds(got) {
            Ok(())
        } else {
            Err(GraphError::Number {
                at: self.site(),
                field,
                expected: range.words(),
                got,
            })
        }
    }

    pub(super) fn attribute(
        self,
        field: &'static str,
        got: u64,
        min: u64,
        max: u64,
    ) -> Result<(), GraphError> {
        if (min..=max).contains(&got) {
            Ok(())
        } else {
            let expected = format!("from {min} to {max}");
            Err(GraphError::Attribute {
                at: self.site(),
                field,
                expected,
                got,
            })
        }
    }

    pub(super) fn parts(self, field: &'static str, got: usize) -> Result<(), GraphError> {
        let max = self.gate.limits.parts_max;
        if got >= 1 && got <= max {
            Ok(())
        } else {
            Err(GraphError::Parts {
                at: self.site(),
                field,
                max,
                got,
            })
        }
    }

    pub(super) fn vocabulary(self, weight: &str, got: u64) -> Result<(), GraphError> {
        // Tokens are u32, whatever the limit says.
        let max = self.gate.limits.vocabulary_max.min(u64::from(u32::MAX));
        if got <= max {
            Ok(())
        } else {
            Err(GraphError::Vocabulary {
                at: self.site_of(weight),
                max,
                got,
            })
        }
    }
}

/// Weights.
impl<'a> Rule<'a> {
    /// An embedding table's entries and width.
    pub(super) fn table(self, weight: &str) -> Result<(u32, u64), GraphError> {
        let info = self.weight("weight", weight)?;
        let [entries, width] = info.shape[..] else {
            return Err(self.weight_shape("weight", weight, "[entries, width]".to_owned(), info));
        };
        if entries == 0 || width == 0 {
            return Err(self.weight_shape("weight", weight, "[entries, width] above 0".to_owned(), info));
        }
        self.vocabulary(weight, entries)?;
        self.blocks("weight", weight, info)?;
        Ok((u32::try_from(entries).expect("bounded by u32 above"), width))
    }

    /// A matrix `[rows, inner]`; its rows. `rows` of `None` stands for any number above 0.
    pub(super) fn matrix(
        self,
        field: &'static str,
        weight: &str,
        rows: Option<u64>,
        inner: u64,
    ) -> Result<u64, GraphError> {
        let info = self.weight(field, weight)?;
        match info.shape[..] {
            [got_rows, got_inner]
                if got_inner == inner && got_rows > 0 && rows.is_none_or(|rows| rows == got_rows) =>
            {
                self.blocks(field, weight, info)?;
                Ok(got_rows)
            }
            _ => {
                let rows = rows.map_or("out".to_owned(), |rows| rows.to_string());
                Err(self.weight_shape(field, weight, format!("[{rows}, {inner}]"), info))
            }
        }
    }

    /// A vector `[length]`, not quantized.
    pub(super) fn vector(self, field: &'static str, weight: &str, length: u64) -> Result<(), GraphError> {
        let info = self.weight(field, weight)?;
        if info.shape != [length] {
            return Err(self.weight_shape(field, weight, format!("[{length}]"), info));
        }
        if info.dtype.block_elements() != 1 {
            return Err(GraphError::WeightDType {
                at: self.site_of(weight),
                field,
                got: info.dtype,
            });
        }
        Ok(())
    }

    pub(super) fn weight(self, field: &'static str, weight: &str) -> Result<&'a WeightInfo, GraphError> {
        let max = self.gate.limits.name_bytes_max;
        if weight.len() > max {
            return Err(GraphError::NameLength {
                at: self.site_of(weight),
                field,
                max,
                got: weight.len(),
            });
        }
        let found = self.gate.weights.tensors.get(weight);
        found.ok_or_else(|| GraphError::WeightMissing {
            at: self.site_of(weight),
            field,
        })
    }

    /// Checks that a matrix is whole blocks and that its bytes can be counted.
    pub(super) fn blocks(
        self,
        field: &'static str,
        weight: &str,
        info: &WeightInfo,
    ) -> Result<(), GraphError> {
        let (Some(rows), Some(inner)) = (info.shape.first(), info.shape.last()) else {
            return Err(self.weight_shape(field, weight, "[out, in]".to_owned(), info));
        };
        let block = info.dtype.block_elements();
        if !inner.is_multiple_of(block as u64) {
            let at = self.site_of(weight);
            return Err(GraphError::WeightBlocks {
                at,
                field,
                dtype: info.dtype,
                block,
                got: *inner,
            });
        }
        let row_bytes = usize::try_from(*inner)
            .ok()
            .and_then(|inner| info.dtype.row_bytes(inner));
        let bytes = row_bytes
            .zip(usize::try_from(*rows).ok())
            .and_then(|(row, rows)| row.checked_mul(rows));
        match bytes {
            Some(_) => Ok(()),
            None => {
                let got = info.shape.clone();
                Err(GraphError::WeightSize {
                    at: self.site_of(weight),
                    field,
                    got,
                })
            }
        }
    }

    pub(super) fn weight_shape(
        self,
        field: &'static str,
        weight: &str,
        expected: String,
        info: &WeightInfo,
    ) -> GraphError {
        GraphError::WeightShape {
            at: self.site_of(weight),
            field,
            expected,
            got: info.shape.clone(),
        }
    }
}

/// Names for errors.
impl Rule<'_> {
    pub(super) fn site(self) -> Box<Site> {
        let weight = match self.op {
            Op::Embedding { weight, .. }
            | Op::Linear { weight, .. }
            | Op::RmsNorm { weight, .. }
            | Op::LayerNorm { weight, .. }
            | Op::Logits { weight, .. } => Some(shortened(weight)),
            Op::MixtureOfExperts { router, .. } => Some(shortened(router)),
            _ => None,
        };
        Box::new(Site {
            node: self.node,
            op: self.op.name(),
            weight,
        })
    }

    pub(super) fn site_of(self, weight: &str) -> Box<Site> {
        Box::new(Site {
            node: self.node,
            op: self.op.name(),
            weight: Some(shortened(weight)),
        })
    }
}

/// A foreign name may be megabytes long; an error message may not.
fn shortened(name: &str) -> Box<str> {
    name.chars().take(64).collect()
}
