//! The queue of waiting requests. Pure: times are arguments, in milliseconds.
//!
//! Order: first the class (interactive, default, bulk). Within a class: the key that was served fewest tokens
//! (start-time fair queueing). Within a key: the earliest deadline, then arrival. A request that has waited for
//! `starvation_ms` is served before all others, so that no class starves.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::config::Priority;

/// Properties of a request that decide its position.
#[derive(Debug, Clone)]
pub struct Ticket {
    /// Priority class.
    pub class: Priority,
    /// Name of the client key.
    pub key: Arc<str>,
    /// Time by which the request should be served.
    pub deadline_ms: u64,
    /// Time of arrival.
    pub arrived_ms: u64,
    /// Expected number of tokens.
    pub tokens: u64,
    /// Size of the request body in bytes.
    pub bytes: usize,
}

struct QueuedItem<T> {
    ticket: Ticket,
    item: T,
}

/// Waiting requests of one key within a class, by deadline and number of arrival.
struct KeyQueue<T> {
    /// Tokens served to the key, in virtual time of the class.
    served: u64,
    waiting: BTreeMap<(u64, u64), QueuedItem<T>>,
}

struct ClassQueue<T> {
    flows: HashMap<Arc<str>, KeyQueue<T>>,
    /// Virtual time of the class. A key that is new or returns starts at this value, so that absence earns no credit.
    now: u64,
}

/// Waiting requests in order.
pub struct WaitQueue<T> {
    classes: [ClassQueue<T>; 3],
    /// Waiting requests by arrival time and number, with class, key and deadline. The first has waited longest.
    arrivals: BTreeMap<(u64, u64), (Priority, Arc<str>, u64)>,
    bytes: usize,
    next_number: u64,
    starvation_ms: u64,
}

/// Position of a waiting request in the queue.
#[derive(Debug, Clone)]
pub struct QueueEntry {
    class: Priority,
    key: Arc<str>,
    deadline_ms: u64,
    arrived_ms: u64,
    number: u64,
}

impl<T> WaitQueue<T> {
    /// Creates an empty queue.
    pub fn new(starvation_ms: u64) -> Self {
        let class = || ClassQueue { flows: HashMap::new(), now: 0 };
        Self {
            classes: [class(), class(), class()],
            arrivals: BTreeMap::new(),
            bytes: 0,
            next_number: 0,
            starvation_ms,
        }
    }

    /// Number of waiting requests.
    pub fn len(&self) -> usize {
        self.arrivals.len()
    }

    /// Returns whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// Bytes of all waiting request bodies.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Arrival time of the request that has waited longest.
    pub fn oldest_arrival_ms(&self) -> Option<u64> {
        self.arrivals.first_key_value().map(|((arrived, _), _)| *arrived)
    }

    /// Sets the waiting time after which a request is served before all others.
    pub fn set_starvation_ms(&mut self, starvation_ms: u64) {
        self.starvation_ms = starvation_ms;
    }

    /// Adds a request and returns its position.
    pub fn push(&mut self, ticket: Ticket, item: T) -> QueueEntry {
        let number = self.next_number;
        self.next_number += 1;
        let entry = QueueEntry {
            class: ticket.class,
            key: Arc::clone(&ticket.key),
            deadline_ms: ticket.deadline_ms,
            arrived_ms: ticket.arrived_ms,
            number,
        };
        self.bytes += ticket.bytes;
        self.arrivals
            .insert((ticket.arrived_ms, number), (ticket.class, Arc::clone(&ticket.key), ticket.deadline_ms));
        let class = &mut self.classes[ticket.class as usize];
        let now = class.now;
        let flow = class
            .flows
            .entry(Arc::clone(&ticket.key))
            .or_insert_with(|| KeyQueue { served: now, waiting: BTreeMap::new() });
        flow.waiting.insert((ticket.deadline_ms, number), QueuedItem { ticket, item });
        entry
    }

    /// Returns the position of the request to serve next, leaving out the numbers in `skip`.
    pub fn next_entry(&self, now_ms: u64, skip: &[u64]) -> Option<QueueEntry> {
        let oldest = self.arrivals.iter().find(|((_, number), _)| !skip.contains(number));
        if let Some(((arrived_ms, number), (class, key, deadline_ms))) = oldest
            && *class != Priority::Interactive
            && arrived_ms + self.starvation_ms <= now_ms
        {
            let key = Arc::clone(key);
            return Some(QueueEntry {
                class: *class,
                key,
                deadline_ms: *deadline_ms,
                arrived_ms: *arrived_ms,
                number: *number,
            });
        }
        self.classes.iter().find_map(|class| {
            let heads = class.flows.iter().filter_map(|(key, flow)| {
                let head = flow.waiting.iter().find(|((_, number), _)| !skip.contains(number))?;
                Some((flow.served, *head.0, key, head.1))
            });
            let (_, (deadline_ms, number), key, waiting) =
                heads.min_by_key(|(served, order, _, _)| (*served, *order))?;
            let ticket = &waiting.ticket;
            let key = Arc::clone(key);
            Some(QueueEntry { class: ticket.class, key, deadline_ms, arrived_ms: ticket.arrived_ms, number })
        })
    }

    /// Returns the newest request of the lowest class below `class`: the first to be rejected to make room for a
    /// request of `class`.
    pub fn displacement_candidate(&self, class: Priority) -> Option<QueueEntry> {
        Priority::ALL.into_iter().rev().take_while(|lower| *lower > class).find_map(|lower| {
            let ((arrived_ms, number), (class, key, deadline_ms)) =
                self.arrivals.iter().rev().find(|(_, (found, _, _))| *found == lower)?;
            let key = Arc::clone(key);
            Some(QueueEntry {
                class: *class,
                key,
                deadline_ms: *deadline_ms,
                arrived_ms: *arrived_ms,
                number: *number,
            })
        })
    }

    /// Returns the request at `entry`, if it still waits.
    pub fn get(&self, entry: &QueueEntry) -> Option<(&Ticket, &T)> {
        let flow = self.classes[entry.class as usize].flows.get(&entry.key)?;
        let waiting = flow.waiting.get(&(entry.deadline_ms, entry.number))?;
        Some((&waiting.ticket, &waiting.item))
    }

    /// Removes and returns the request at `entry`. If `served`, its tokens are charged to its key.
    pub fn remove(&mut self, entry: &QueueEntry, served: bool) -> Option<T> {
        let class = &mut self.classes[entry.class as usize];
        let flow = class.flows.get_mut(&entry.key)?;
        let waiting = flow.waiting.remove(&(entry.deadline_ms, entry.number))?;
        self.arrivals.remove(&(entry.arrived_ms, entry.number));
        self.bytes -= waiting.ticket.bytes;
        if served {
            class.now = class.now.max(flow.served);
            flow.served += waiting.ticket.tokens.max(1);
        }
        if flow.waiting.is_empty() && flow.served <= class.now {
            class.flows.remove(&entry.key);
        } else if class.flows.len() > 1024 {
            // Bounds the map: flows without waiting requests and without debt hold no information.
            let now = class.now;
            class.flows.retain(|_, flow| !flow.waiting.is_empty() || flow.served > now);
        }
        Some(waiting.item)
    }

    /// All positions, unordered.
    pub fn entries(&self) -> impl Iterator<Item = QueueEntry> {
        self.arrivals.iter().map(|((arrived_ms, number), (class, key, deadline_ms))| QueueEntry {
            class: *class,
            key: Arc::clone(key),
            deadline_ms: *deadline_ms,
            arrived_ms: *arrived_ms,
            number: *number,
        })
    }
}

impl QueueEntry {
    /// Number of the request, unique within the queue.
    pub fn number(&self) -> u64 {
        self.number
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket(class: Priority, key: &str, deadline_ms: u64, arrived_ms: u64, tokens: u64) -> Ticket {
        Ticket { class, key: key.into(), deadline_ms, arrived_ms, tokens, bytes: 10 }
    }

    fn drain(queue: &mut WaitQueue<u64>, now_ms: u64) -> Vec<u64> {
        let mut order = Vec::new();
        while let Some(entry) = queue.next_entry(now_ms, &[]) {
            order.extend(queue.remove(&entry, true));
        }
        order
    }

    #[test]
    fn orders_by_class_then_key_then_deadline() {
        let mut queue = WaitQueue::new(60_000);
        for (item, class, key, deadline) in [
            (0, Priority::Bulk, "a", 100),
            (1, Priority::Default, "a", 300),
            (2, Priority::Default, "a", 200),
            (3, Priority::Default, "b", 900),
            (4, Priority::Interactive, "c", 999),
        ] {
            queue.push(ticket(class, key, deadline, item, 10), item);
        }
        assert_eq!(drain(&mut queue, 10), [4, 2, 3, 1, 0]);
        assert_eq!((queue.len(), queue.bytes()), (0, 0));
    }

    #[test]
    fn starving_request_is_first_and_newest_bulk_is_displaceable() {
        let mut queue = WaitQueue::new(1_000);
        queue.push(ticket(Priority::Bulk, "a", 9_000, 0, 1), 0);
        queue.push(ticket(Priority::Bulk, "a", 9_000, 500, 1), 1);
        queue.push(ticket(Priority::Interactive, "b", 9_000, 500, 1), 2);
        let entry = queue.displacement_candidate(Priority::Interactive).unwrap();
        assert_eq!(queue.get(&entry).unwrap().1, &1);
        assert!(queue.displacement_candidate(Priority::Bulk).is_none());
        assert_eq!(drain(&mut queue, 1_000), [0, 2, 1]);
    }

    proptest! {
        #[test]
        fn busy_key_does_not_delay_another(sizes in prop::collection::vec(1u64..200, 40..80)) {
            // Key `a` has a long queue and key `b` sends single requests. No more than one request of `a` is served
            // before one of `b`.
            let mut queue = WaitQueue::new(u64::MAX / 2);
            for (number, tokens) in sizes.iter().enumerate() {
                queue.push(ticket(Priority::Default, "a", 0, number as u64, *tokens), 0);
            }
            for _ in 0..10 {
                let entry = queue.next_entry(0, &[]).unwrap();
                queue.remove(&entry, true);
                queue.push(ticket(Priority::Default, "b", 0, 1_000, 1), 1);
                let mut before = 0;
                loop {
                    let entry = queue.next_entry(0, &[]).unwrap();
                    if queue.remove(&entry, true) == Some(1) { break; }
                    before += 1;
                }
                prop_assert!(before <= 1, "{before}");
            }
        }

        #[test]
        fn every_request_is_taken_exactly_once(items in prop::collection::vec((0usize..3, 0u8..4, 0u64..50, 0u64..50, 0u64..9), 0..60), leave in prop::collection::vec(any::<bool>(), 60)) {
            let mut queue = WaitQueue::new(20);
            let mut entries = Vec::new();
            for (number, (class, key, deadline, arrived, tokens)) in items.iter().enumerate() {
                let ticket = ticket(Priority::ALL[*class], &key.to_string(), *deadline, *arrived, *tokens);
                entries.push(queue.push(ticket, number as u64));
            }
            let mut seen: Vec<u64> = Vec::new();
            for (entry, leaves) in entries.iter().zip(&leave) {
                if *leaves { seen.extend(queue.remove(entry, false)); }
            }
            prop_assert_eq!(queue.bytes(), queue.len() * 10);
            seen.extend(drain(&mut queue, 40));
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..items.len() as u64).collect::<Vec<_>>());
            prop_assert!(queue.is_empty() && queue.bytes() == 0 && queue.oldest_arrival_ms().is_none());
        }
    }
}
