//! Objects with resource versions, and events for watches.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};
use tokio::sync::watch;

/// Key of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Group and plural, such as `apps/deployments` or `pods`.
    pub resource: String,
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
}

impl Key {
    /// Key of an object in the namespace `test`.
    pub fn new(resource: &str, name: &str) -> Self {
        Self { resource: resource.to_owned(), namespace: "test".to_owned(), name: name.to_owned() }
    }
}

/// A change of an object.
#[derive(Debug, Clone)]
pub struct Event {
    /// Resource version after the change.
    pub version: u64,
    /// `ADDED`, `MODIFIED` or `DELETED`.
    pub kind: &'static str,
    /// Key of the object.
    pub key: Key,
    /// The object after the change.
    pub object: Value,
}

/// All objects.
pub struct Store {
    version: u64,
    objects: BTreeMap<Key, Value>,
    events: VecDeque<Event>,
    /// Version up to which events are discarded.
    forgotten: u64,
    changed: watch::Sender<u64>,
}

impl Default for Store {
    fn default() -> Self {
        let (changed, _) = watch::channel(1);
        Self { version: 1, objects: BTreeMap::new(), events: VecDeque::new(), forgotten: 0, changed }
    }
}

/// Applies a merge patch (RFC 7386).
pub fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (name, value) in changes {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(name);
        } else {
            merge(&mut target[name], value);
        }
    }
}

/// Returns whether an object has the labels of a selector such as `a=b,c=d`.
pub fn selected(object: &Value, selector: &str) -> bool {
    selector.split(',').filter(|part| !part.is_empty()).all(|part| {
        let (name, value) = part.split_once('=').expect("selectors of the tests are equalities");
        object["metadata"]["labels"][name] == value
    })
}

impl Store {
    /// Version of the last change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Returns a receiver that is notified of every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Returns an object.
    pub fn get(&self, key: &Key) -> Option<&Value> {
        self.objects.get(key)
    }

    /// Returns all objects of a resource that match the selector.
    pub fn list(&self, resource: &str, selector: &str) -> Vec<(Key, Value)> {
        let all = self.objects.iter().filter(|(key, _)| key.resource == resource);
        all.filter(|(_, object)| selected(object, selector))
            .map(|(key, object)| (key.clone(), object.clone()))
            .collect()
    }

    /// Creates or replaces an object and assigns a version.
    pub fn put(&mut self, key: &Key, mut object: Value) -> Value {
        self.version += 1;
        let kind = if self.objects.contains_key(key) { "MODIFIED" } else { "ADDED" };
        let meta = &mut object["metadata"];
        meta["name"] = json!(key.name);
        meta["namespace"] = json!(key.namespace);
        meta["resourceVersion"] = json!(self.version.to_string());
        if meta["uid"].is_null() {
            meta["uid"] = json!(format!("uid-{}", self.version));
        }
        self.objects.insert(key.clone(), object.clone());
        self.happened(kind, key, object.clone());
        object
    }

    /// Applies a patch to an existing object.
    pub fn change(&mut self, key: &Key, patch: &Value) -> Option<Value> {
        let mut object = self.objects.get(key)?.clone();
        let before = object.clone();
        merge(&mut object, patch);
        // A patch without effect creates no version and no event.
        if object == before { Some(object) } else { Some(self.put(key, object)) }
    }

    /// Removes an object.
    pub fn remove(&mut self, key: &Key) {
        if let Some(object) = self.objects.remove(key) {
            self.version += 1;
            self.happened("DELETED", key, object);
        }
    }

    fn happened(&mut self, kind: &'static str, key: &Key, mut object: Value) {
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.events.push_back(Event { version: self.version, kind, key: key.clone(), object });
        self.changed.send_replace(self.version);
    }

    /// Returns the events after `version`, or `None` if they are discarded.
    pub fn since(&self, version: u64) -> Option<Vec<Event>> {
        if version < self.forgotten {
            return None;
        }
        Some(self.events.iter().filter(|event| event.version > version).cloned().collect())
    }

    /// Discards all events, as a server does after some minutes.
    pub fn forget(&mut self) {
        self.version += 1;
        self.forgotten = self.version;
        self.events.clear();
    }
}
