//! The API server: paths, verbs, roles, conflicts, watches, the `/scale` and `/eviction` subresources, and faults.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use futures_util::stream;
use http::{Method, StatusCode, header};
use serde_json::{Value, json};

use super::rights::Attempt;
use super::store::{Event, Key, merge, selected};
use super::{Fault, Inner, lock, pod_labels};

pub(super) fn router(cluster: &Arc<Inner>) -> Router {
    Router::new().fallback(answer).with_state(Arc::clone(cluster))
}

fn status(code: u16, reason: &str, message: String) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code});
    (StatusCode::from_u16(code).unwrap(), Json(body)).into_response()
}

struct Asked {
    key: Key,
    sub: Option<String>,
    attempt: Attempt,
    query: Vec<(String, String)>,
    body: Value,
}

impl Asked {
    fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

async fn answer(State(cluster): State<Arc<Inner>>, request: Request) -> Response {
    let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let user = token.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default().to_owned();
    let Some(rights) = lock(&cluster.users).get(&user).cloned() else {
        return status(401, "Unauthorized", "Unauthorized".to_owned());
    };
    let merges = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind == "application/merge-patch+json");
    let is_patch = request.method() == Method::PATCH;
    let path = request.uri().path().to_owned();
    let Some(asked) = read(request).await else {
        return status(404, "NotFound", format!("the server could not find `{path}`"));
    };
    if is_patch && !merges {
        return status(415, "UnsupportedMediaType", "only merge patches are known here".to_owned());
    }
    let fault = {
        let mut faults = lock(&cluster.faults);
        let hit = faults.planned.iter_mut().find(|(verb, resource, left, _)| {
            *left > 0 && *verb == asked.attempt.verb && *resource == asked.attempt.resource
        });
        hit.map(|(_, _, left, fault)| {
            *left -= 1;
            *fault
        })
    };
    let granted = rights.grant(&asked.attempt);
    let response = match fault {
        _ if !granted => {
            let Attempt { verb, group, resource, name } = &asked.attempt;
            let message = format!(
                "{resource}{}{group} \"{}\" is forbidden: User \"{user}\" cannot {verb} resource \"{resource}\" in API group \"{group}\"",
                if group.is_empty() { "" } else { "." },
                name.as_deref().unwrap_or_default(),
            );
            status(403, "Forbidden", message)
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Status(code)) => status(code, "Fault", format!("a fault of the test ({code})")),
        None => serve(&cluster, &asked).await,
    };
    lock(&cluster.audit).push((user, asked.attempt, response.status().as_u16()));
    response
}

/// Parses a request.
async fn read(request: Request) -> Option<Asked> {
    let (parts, body) = request.into_parts();
    let segments: Vec<&str> = parts.uri.path().trim_matches('/').split('/').collect();
    let (group, rest) = match segments.as_slice() {
        ["api", "v1", "namespaces", rest @ ..] => (String::new(), rest),
        ["apis", group, _version, "namespaces", rest @ ..] => ((*group).to_owned(), rest),
        _ => return None,
    };
    let (namespace, plural, name, sub) = match rest {
        [namespace, plural] => (namespace, plural, None, None),
        [namespace, plural, name] => (namespace, plural, Some((*name).to_owned()), None),
        [namespace, plural, name, sub] => {
            (namespace, plural, Some((*name).to_owned()), Some((*sub).to_owned()))
        }
        _ => return None,
    };
    let query: Vec<(String, String)> = parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name.to_owned(), decoded(value)))
        .collect();
    let watches = query.iter().any(|(name, value)| name == "watch" && (value == "true" || value == "1"));
    let verb = match (parts.method, &name) {
        (Method::GET, Some(_)) => "get",
        (Method::GET, None) if watches => "watch",
        (Method::GET, None) => "list",
        (Method::POST, _) => "create",
        (Method::PUT, _) => "update",
        (Method::PATCH, _) => "patch",
        (Method::DELETE, _) => "delete",
        _ => return None,
    };
    let bytes = axum::body::to_bytes(Body::new(body), 1 << 20).await.ok()?;
    let body = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let resource = if group.is_empty() { (*plural).to_owned() } else { format!("{group}/{plural}") };
    let tried = match &sub {
        Some(sub) => format!("{plural}/{sub}"),
        None => (*plural).to_owned(),
    };
    Some(Asked {
        key: Key { resource, namespace: (*namespace).to_owned(), name: name.clone().unwrap_or_default() },
        sub,
        attempt: Attempt { verb, group, resource: tried, name },
        query,
        body,
    })
}

/// Decodes percent encoding.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        if *first == b'%' {
            let hex = std::str::from_utf8(&more[..2]).unwrap();
            bytes.push(u8::from_str_radix(hex, 16).unwrap());
            rest = &more[2..];
        } else {
            bytes.push(if *first == b'+' { b' ' } else { *first });
            rest = more;
        }
    }
    String::from_utf8(bytes).unwrap()
}

async fn serve(cluster: &Arc<Inner>, asked: &Asked) -> Response {
    let key = &asked.key;
    let missing = || status(404, "NotFound", format!("{} \"{}\" not found", key.resource, key.name));
    if asked.attempt.verb == "watch" {
        return watch(cluster, asked);
    }
    let mut store = lock(&cluster.store);
    let conflict = |current: &Value, sent: &Value| {
        let sent = &sent["metadata"]["resourceVersion"];
        (!sent.is_null() && *sent != current["metadata"]["resourceVersion"]).then(|| {
            let message = format!(
                "Operation cannot be fulfilled on {} \"{}\": the object has been modified",
                key.resource, key.name
            );
            status(409, "Conflict", message)
        })
    };
    match (asked.attempt.verb, asked.sub.as_deref()) {
        ("list", None) => {
            let items = store.list(&key.resource, asked.query("labelSelector").unwrap_or_default());
            let items: Vec<Value> = items.into_iter().map(|(_, object)| object).collect();
            let version = store.version().to_string();
            Json(json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items})).into_response()
        }
        ("get", None) => store.get(key).map_or_else(missing, |object| Json(object).into_response()),
        ("create", None) => {
            let name = asked.body["metadata"]["name"].as_str().unwrap_or_default();
            let key = Key { name: name.to_owned(), ..key.clone() };
            if store.get(&key).is_some() {
                return status(409, "AlreadyExists", format!("{} \"{name}\" already exists", key.resource));
            }
            (StatusCode::CREATED, Json(store.put(&key, asked.body.clone()))).into_response()
        }
        ("patch", None) => {
            let Some(current) = store.get(key) else { return missing() };
            if let Some(conflict) = conflict(current, &asked.body) {
                return conflict;
            }
            let mut patch = asked.body.clone();
            if let Some(meta) = patch["metadata"].as_object_mut() {
                meta.remove("resourceVersion");
            }
            Json(store.change(key, &patch)).into_response()
        }
        ("get", Some("scale")) => {
            store.get(key).map_or_else(missing, |object| Json(scale(&key.resource, object)).into_response())
        }
        ("patch", Some("scale")) => {
            let Some(current) = store.get(key).cloned() else { return missing() };
            if let Some(conflict) = conflict(&current, &asked.body) {
                return conflict;
            }
            let replicas = &asked.body["spec"]["replicas"];
            if !replicas.is_u64() {
                return status(422, "Invalid", "spec.replicas: Invalid value".to_owned());
            }
            let change = json!({"spec": {"replicas": replicas}});
            let after = if asked.query("dryRun") == Some("All") {
                let mut object = current;
                merge(&mut object, &change);
                object
            } else {
                store.change(key, &change).unwrap()
            };
            Json(scale(&key.resource, &after)).into_response()
        }
        ("create", Some("eviction")) => {
            let Some(pod) = store.get(key).cloned() else { return missing() };
            for (budget, object) in store.list("policy/poddisruptionbudgets", "") {
                let labels = object["spec"]["selector"]["matchLabels"].as_object().unwrap();
                let selector: Vec<_> =
                    labels.iter().map(|(k, v)| format!("{k}={}", v.as_str().unwrap())).collect();
                if selected(&pod, &selector.join(",")) && object["spec"]["maxUnavailable"] == 0 {
                    let message = format!(
                        "Cannot evict pod as it would violate the pod's disruption budget `{}`.",
                        budget.name
                    );
                    return status(429, "TooManyRequests", message);
                }
            }
            store.change(key, &json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
            (StatusCode::CREATED, Json(json!({"kind": "Status", "status": "Success"}))).into_response()
        }
        ("delete", None) => {
            store.change(key, &json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}));
            Json(json!({"kind": "Status", "status": "Success"})).into_response()
        }
        _ => status(405, "MethodNotAllowed", "not here".to_owned()),
    }
}

fn scale(resource: &str, object: &Value) -> Value {
    let selector: Vec<_> =
        pod_labels(resource, object).into_iter().map(|(name, value)| format!("{name}={value}")).collect();
    let meta = &object["metadata"];
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {"name": meta["name"], "namespace": meta["namespace"], "resourceVersion": meta["resourceVersion"]},
        "spec": {"replicas": object["spec"]["replicas"]},
        "status": {"replicas": object["spec"]["replicas"], "selector": selector.join(",")}})
}

fn line(kind: &str, object: &Value) -> Bytes {
    let mut text = json!({"type": kind, "object": object}).to_string();
    text.push('\n');
    text.into()
}

fn watch(cluster: &Arc<Inner>, asked: &Asked) -> Response {
    let from: u64 = asked.query("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
    let seconds: u64 = asked.query("timeoutSeconds").and_then(|text| text.parse().ok()).unwrap_or(290);
    let until = tokio::time::Instant::now() + Duration::from_secs(seconds);
    let (resource, selector) =
        (asked.key.resource.clone(), asked.query("labelSelector").unwrap_or_default().to_owned());
    let bookmarks = asked.query("allowWatchBookmarks") == Some("true");
    let changes = lock(&cluster.store).changes();
    let epoch = lock(&cluster.faults).watch_epoch;
    let state = (Arc::clone(cluster), changes, from, false);
    let body = stream::unfold(state, move |(cluster, mut changes, from, mut over)| {
        let (resource, selector) = (resource.clone(), selector.clone());
        async move {
            loop {
                if over || tokio::time::Instant::now() >= until || lock(&cluster.faults).watch_epoch != epoch
                {
                    return None;
                }
                let (news, version) = {
                    let store = lock(&cluster.store);
                    (store.since(from), store.version())
                };
                let Some(news) = news else {
                    over = true;
                    let gone = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "message": "too old resource version", "reason": "Expired", "code": 410});
                    return Some((
                        Ok::<_, std::io::Error>(line("ERROR", &gone)),
                        (cluster, changes, from, over),
                    ));
                };
                let fits =
                    |event: &&Event| event.key.resource == resource && selected(&event.object, &selector);
                let lines: Vec<Bytes> =
                    news.iter().filter(fits).map(|event| line(event.kind, &event.object)).collect();
                if !lines.is_empty() {
                    return Some((Ok(lines.concat().into()), (cluster, changes, version, over)));
                }
                if tokio::time::timeout(Duration::from_millis(500), changes.changed()).await.is_err()
                    && bookmarks
                {
                    let mark = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": version.to_string()}});
                    return Some((Ok(line("BOOKMARK", &mark)), (cluster, changes, version, over)));
                }
            }
        }
    });
    ([(header::CONTENT_TYPE, "application/json")], Body::from_stream(body)).into_response()
}
