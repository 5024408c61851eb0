//! Who holds which block of the KV cache, by numbers alone.
//!
//! A block holds the keys and values of a fixed number of tokens. Sequences share whole blocks of a common beginning: a full
//! block is known by a key that chains the tokens of all blocks up to it, so equal keys mean equal content. A block that
//! nobody uses keeps its content until the room is needed; the one unused for longest goes first, and of one sequence its end
//! before its beginning (paged attention and prefix sharing as in vLLM, arXiv:2309.06180).

use std::collections::{BTreeSet, HashMap};

/// Stands for the tokens of a block and of all blocks before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key([u8; 16]);

impl Key {
    /// The key of `tokens` behind the block `parent`. A cryptographic hash: nobody can make a prompt that hits the blocks of
    /// another one.
    pub(crate) fn after(parent: Option<Self>, tokens: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parent.map_or([0; 16], |parent| parent.0));
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(key)
    }
}

#[derive(Debug, Default)]
struct Block {
    users: u32,
    key: Option<Key>,
    /// When it was let go; 0 while it holds nothing.
    freed: u64,
}

/// The blocks of a cache.
#[derive(Debug)]
pub(crate) struct Blocks {
    size: usize,
    blocks: Vec<Block>,
    /// Blocks without users, those to be taken first in front.
    free: BTreeSet<(u64, u32)>,
    by_key: HashMap<Key, u32>,
    clock: u64,
}

impl Blocks {
    /// `count` blocks of `size` tokens.
    pub(crate) fn new(size: usize, count: usize) -> Self {
        let blocks = (0..count).map(|_| Block::default()).collect();
        let free = (0..count as u32).map(|block| (0, block)).collect();
        Self { size, blocks, free, by_key: HashMap::new(), clock: 0 }
    }

    /// Tokens of a block.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// All blocks.
    pub(crate) fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody uses.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// How many of the first `keys` are at hand, and how many of those nobody uses (sharing them takes them from the free).
    pub(crate) fn at_hand(&self, keys: &[Key]) -> (usize, usize) {
        let found = keys.iter().map_while(|key| self.by_key.get(key));
        found.fold((0, 0), |(all, unused), block| {
            (all + 1, unused + usize::from(self.blocks[*block as usize].users == 0))
        })
    }

    /// Uses the blocks of `keys`, which must be at hand.
    pub(crate) fn share(&mut self, keys: &[Key]) -> Vec<u32> {
        let found: Vec<u32> = keys.iter().map_while(|key| self.by_key.get(key)).copied().collect();
        debug_assert_eq!(found.len(), keys.len());
        for &block in &found {
            let entry = &mut self.blocks[block as usize];
            if entry.users == 0 {
                self.free.remove(&(entry.freed, block));
            }
            entry.users += 1;
        }
        found
    }

    /// Uses `count` blocks whose content is gone, or none if there are fewer.
    pub(crate) fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if self.free.len() < count {
            return None;
        }
        let taken = (0..count).filter_map(|_| self.free.pop_first()).map(|(_, block)| block);
        let taken: Vec<u32> = taken.collect();
        for &block in &taken {
            let entry = &mut self.blocks[block as usize];
            entry.users = 1;
            if let Some(key) = entry.key.take() {
                self.by_key.remove(&key);
            }
        }
        Some(taken)
    }

    /// A block is full and can be shared from now on. Where another block has the same content already, that one stays known.
    pub(crate) fn publish(&mut self, block: u32, key: Key) {
        if let std::collections::hash_map::Entry::Vacant(vacant) = self.by_key.entry(key) {
            vacant.insert(block);
            self.blocks[block as usize].key = Some(key);
        }
    }

    /// Nothing that was computed before is worth anything.
    pub(crate) fn forget(&mut self) {
        self.by_key.clear();
        self.free.clear();
        for (entry, number) in self.blocks.iter_mut().zip(0..) {
            (entry.key, entry.freed) = (None, 0);
            if entry.users == 0 {
                self.free.insert((0, number));
            }
        }
    }

    /// Lets a sequence's blocks go.
    pub(crate) fn release(&mut self, table: &[u32]) {
        for &block in table.iter().rev() {
            let entry = &mut self.blocks[block as usize];
            entry.users -= 1;
            if entry.users == 0 {
                self.clock += 1;
                entry.freed = if entry.key.is_some() { self.clock } else { 0 };
                self.free.insert((entry.freed, block));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chain(tokens: &[u32]) -> Vec<Key> {
        let mut keys = Vec::new();
        for chunk in tokens.chunks_exact(2) {
            keys.push(Key::after(keys.last().copied(), chunk));
        }
        keys
    }

    #[test]
    fn a_key_says_all_that_went_before() {
        assert_eq!(chain(&[1, 2, 3, 4])[..1], chain(&[1, 2, 9, 9])[..1]);
        assert_ne!(chain(&[1, 2, 3, 4])[1], chain(&[0, 2, 3, 4])[1]);
        assert_ne!(chain(&[1, 2])[0], chain(&[1, 2, 1, 2])[1]);
    }

    #[test]
    fn the_end_of_a_sequence_is_forgotten_before_its_beginning() {
        let mut blocks = Blocks::new(2, 3);
        let keys = chain(&[1, 2, 3, 4, 5, 6]);
        let table = blocks.take(3).unwrap();
        table.iter().zip(&keys).for_each(|(block, key)| blocks.publish(*block, *key));
        blocks.release(&table);
        assert_eq!(blocks.at_hand(&keys), (3, 3));
        let one = blocks.take(1).unwrap();
        assert_eq!((blocks.at_hand(&keys), one), ((2, 2), vec![table[2]]));
    }

    proptest! {
        /// Users are counted right whatever happens: nothing is lost, nothing used is given away, shared content stays.
        #[test]
        fn blocks_are_neither_lost_nor_used_twice(steps in prop::collection::vec((0usize..4, prop::collection::vec(0u32..3, 2..9)), 1..80)) {
            let mut blocks = Blocks::new(2, 12);
            let mut held: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
            for (what, tokens) in steps {
                if what == 0 && !held.is_empty() {
                    let (_, table) = held.swap_remove(tokens.len() % held.len());
                    blocks.release(&table);
                } else {
                    let keys = chain(&tokens);
                    let (shared, unused) = blocks.at_hand(&keys);
                    let needed = tokens.len().div_ceil(2) - shared;
                    if blocks.free() - unused >= needed {
                        let mut table = blocks.share(&keys[..shared]);
                        table.extend(blocks.take(needed).unwrap());
                        for (block, key) in table.iter().zip(&keys) {
                            blocks.publish(*block, *key);
                        }
                        held.push((tokens, table));
                    }
                }
                let mut users = vec![0u32; 12];
                held.iter().flat_map(|(_, table)| table).for_each(|block| users[*block as usize] += 1);
                for (entry, users) in blocks.blocks.iter().zip(&users) {
                    prop_assert_eq!(entry.users, *users);
                }
                prop_assert_eq!(blocks.free(), users.iter().filter(|users| **users == 0).count());
                // Two sequences share a block only where they agree on all tokens up to its end.
                for (tokens, table) in &held {
                    for (other, theirs) in &held {
                        for at in 0..table.len().min(theirs.len()) {
                            if table[at] == theirs[at] {
                                let end = ((at + 1) * 2).min(tokens.len());
                                prop_assert_eq!(tokens.get(..end), other.get(..end));
                            }
                        }
                    }
                }
            }
        }
    }
}
