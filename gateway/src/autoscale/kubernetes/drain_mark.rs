//! The annotation of a pod that drains.

use potstill_shared::id;

/// Suffix of the annotation's value when no gateway has a request on the pod.
const EVICTABLE: &str = "/empty";

/// Mark of a pod that receives no new requests. Each drain has an id of its own, so a report about one drain of a pod is never
/// mistaken for a report about the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DrainMark {
    pub(super) id: String,
    /// No gateway has a request on the pod, so it may be deleted at any time. Stays true until the pod is revived.
    pub(super) evictable: bool,
}

impl DrainMark {
    /// Begins a drain with a new id.
    pub(super) fn new() -> Self {
        Self { id: id::unique_id("d"), evictable: false }
    }

    /// Value of the annotation.
    pub(super) fn value(&self) -> String {
        format!("{}{}", self.id, if self.evictable { EVICTABLE } else { "" })
    }

    /// Parses a value that [`Self::value`] wrote. Any other value is an id.
    pub(super) fn parse(text: &str) -> Self {
        let id = text.strip_suffix(EVICTABLE);
        Self { id: id.unwrap_or(text).to_owned(), evictable: id.is_some() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_survive_a_round_trip_and_have_unique_ids() {
        let mark = DrainMark::new();
        let evictable = DrainMark { evictable: true, ..mark.clone() };
        assert_eq!(DrainMark::parse(&mark.value()), mark);
        assert_eq!(DrainMark::parse(&evictable.value()), evictable);
        assert_ne!(DrainMark::new().id, mark.id);
        assert_eq!(DrainMark::parse("true"), DrainMark { id: "true".to_owned(), evictable: false });
    }
}
