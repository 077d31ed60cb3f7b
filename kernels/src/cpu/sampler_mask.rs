//! Leaves out the logits of tokens that a mask forbids, and finds the tokens again. Knows no plans.
//!
//! What is forbidden is not there: no filter, sum or tie can see it, and a row of which few tokens are allowed is short.

use galerne_core::ids::TokenId;

/// Tokens of one word of a mask.
const WORD: usize = u32::BITS as usize;
/// Words with more allowed tokens are gone through token by token, allowed or not, without a branch to mispredict.
const FEW: u32 = 8;

/// A row without its forbidden logits; keeps its room.
#[derive(Debug, Default)]
pub(crate) struct Packed {
    logits: Vec<f32>,
    /// For each word of the mask, where its logits begin in the row.
    starts: Vec<u32>,
}

impl Packed {
    /// Takes the allowed logits of a row, in the order of ids. Bit `t % 32` of word `t / 32` allows token `t`.
    pub(crate) fn fill(&mut self, logits: &[f32], mask: &[u32]) {
        self.starts.clear();
        self.logits.resize(logits.len() + WORD, 0.0);
        let mut length = 0;
        let (words, rest) = logits.as_chunks::<WORD>();
        for (values, &word) in words.iter().zip(mask) {
            self.starts.push(length as u32);
            let room = &mut self.logits[length..length + WORD];
            length += pack(values, word, room);
        }
        if let Some(&word) = mask.get(words.len()) {
            self.starts.push(length as u32);
            let mut values = [0.0; WORD];
            values[..rest.len()].copy_from_slice(rest);
            let word = word & ((1_u32 << rest.len()) - 1);
            length += pack(&values, word, &mut self.logits[length..]);
        }
        self.logits.truncate(length);
    }

    /// The allowed logits.
    pub(crate) fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// The token whose logit lies at `place` among the allowed ones.
    pub(crate) fn token(&self, mask: &[u32], place: TokenId) -> TokenId {
        let at = self.starts.partition_point(|&start| start <= place.0) - 1;
        let mut word = mask[at];
        for _ in 0..place.0 - self.starts[at] {
            word &= word - 1;
        }
        TokenId(at as u32 * u32::BITS + word.trailing_zeros())
    }
}

/// Writes the allowed of 32 logits to the beginning of `room`; returns their number. What follows is overwritten too.
fn pack(values: &[f32; WORD], mut word: u32, room: &mut [f32]) -> usize {
    let count = word.count_ones() as usize;
    if word == u32::MAX {
        room[..WORD].copy_from_slice(values);
    } else if word.count_ones() <= FEW {
        for to in &mut room[..count] {
            *to = values[word.trailing_zeros() as usize];
            word &= word - 1;
        }
    } else {
        let mut place = 0;
        for (bit, value) in values.iter().enumerate() {
            room[place] = *value;
            place += (word >> bit & 1) as usize;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_logits_keep_their_order_and_their_tokens() {
        for length in [1, 31, 32, 33, 64, 100] {
            let logits: Vec<f32> = (0..length as u16).map(f32::from).collect();
            for words in [
                [u32::MAX; 4],
                [0x8000_0001, 0, 0xaaaa_aaaa, 0xff],
                [0x7fff_ffff, u32::MAX, 0x10, 1],
            ] {
                let mask = &words[..logits.len().div_ceil(WORD)];
                let allowed: Vec<f32> = (0..length)
                    .filter(|t| words[t / WORD] >> (t % WORD) & 1 == 1)
                    .map(|t| logits[t])
                    .collect();
                let mut packed = Packed::default();
                packed.fill(&logits, mask);
                assert_eq!(packed.logits(), allowed, "{length} logits under {words:x?}");
                for (place, logit) in allowed.iter().enumerate() {
                    let token = packed.token(mask, TokenId(place as u32));
                    assert_eq!(logits[token.index()], *logit, "{length} logits under {words:x?}");
                }
            }
        }
    }
}
