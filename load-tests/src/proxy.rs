//! A bare reverse proxy: the cost of hyper alone, as a lower bound. One upstream; headers and bodies are forwarded
//! without inspection.

use std::convert::Infallible;

use clap::Args;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

/// Arguments of `proxy`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Port to listen on
    #[arg(long)]
    port: u16,
    /// Port of the upstream
    #[arg(long)]
    to: u16,
}

/// Serves until the process is killed.
pub(crate) async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", arguments.port)).await?;
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let client: Client<_, Incoming> = Client::builder(TokioExecutor::new()).build(connector);
    let to = format!("127.0.0.1:{}", arguments.to);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (client, to) = (client.clone(), to.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let client = client.clone();
            let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
            let uri = Uri::builder().scheme("http").authority(to.as_str()).path_and_query(path).build();
            async move {
                if let Ok(uri) = uri {
                    *request.uri_mut() = uri;
                }
                let answer = client.request(request).await;
                Ok::<_, Infallible>(match answer {
                    Ok(answer) => answer.map(http_body_util::Either::Left),
                    Err(_) => {
                        let mut answer =
                            Response::new(http_body_util::Either::Right(http_body_util::Empty::new()));
                        *answer.status_mut() = hyper::StatusCode::BAD_GATEWAY;
                        answer
                    }
                })
            }
        });
        tokio::spawn(async move {
            let _ended = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
