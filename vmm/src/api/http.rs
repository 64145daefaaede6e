//! The process that clients talk to: HTTP and JSON in, typed requests out to the process that has the machine.
//!
//! It is confined: it has the listening socket, its clients and the way to the other process, opens nothing, and makes the
//! few system calls of its kind alone. One thread serves all clients; none of them can keep another waiting, and it sleeps
//! while nobody wants anything: there are no timers. A client that hangs is not timed out but loses its connection when
//! there is no room for another's.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net;
use std::rc::Rc;
use std::sync::Arc;

use agent_protocol::frame;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream, unix};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::{AbortHandle, LocalSet, spawn_local, yield_now};

use super::call::{Answer, Call, Method, Reply, Request};
use super::route;

/// The most connections. Firecracker's server has ten.
pub const MOST_CONNECTIONS: usize = 64;

/// The most requests that wait for the other process.
const MOST_CALLS: usize = 64;

/// How often everybody gets a turn when the other process is gone.
const LAST_TURNS: usize = 16;

/// What is remembered of a path for the log, in bytes.
const PATH_FOR_LOG: usize = 256;

/// What all connections share.
struct Server {
    /// Longest body of a request in bytes.
    max_payload: usize,
    connections: RefCell<Vec<Connection>>,
    /// Counts what happens, to know which connection has been quiet for longest.
    moment: Cell<u64>,
    calls: mpsc::UnboundedSender<Call>,
    waiting: RefCell<HashMap<u64, Waiting>>,
    next_call: Cell<u64>,
    room: Arc<Semaphore>,
}

/// A connection of a client.
struct Connection {
    number: u64,
    /// The moment of its last request or answer.
    last: u64,
    /// Whether a whole request of it waits for its answer.
    is_busy: bool,
    task: AbortHandle,
}

/// Who waits for an answer. The permit makes room when it is gone.
struct Waiting {
    client: oneshot::Sender<Answer>,
    _room: OwnedSemaphorePermit,
}

/// Serves the clients of `listener` until the other process, at the other end of `desk`, goes away. `ready` is called when all
/// is prepared and before the first client is heard.
///
/// # Errors
/// What the host says.
pub fn serve(
    listener: OwnedFd,
    desk: OwnedFd,
    max_payload: usize,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let listener = net::UnixListener::from(listener);
    let desk = net::UnixStream::from(desk);
    listener.set_nonblocking(true)?;
    desk.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        let listener = UnixListener::from_std(listener)?;
        let (replies, orders) = UnixStream::from_std(desk)?.into_split();
        let (calls, to_send) = mpsc::unbounded_channel();
        let server = Rc::new(Server {
            max_payload,
            connections: RefCell::default(),
            moment: Cell::new(0),
            calls,
            // Made here, as it asks the kernel for random numbers.
            waiting: RefCell::new(HashMap::new()),
            next_call: Cell::new(0),
            room: Arc::new(Semaphore::new(MOST_CALLS)),
        });
        ready()?;
        spawn_local(send_calls(orders, to_send));
        spawn_local(accept_clients(Rc::clone(&server), listener));
        take_replies(&server, replies).await
    })
}

/// Hands requests to the other process. If that is gone, [`take_replies`] hears of it.
async fn send_calls(mut orders: unix::OwnedWriteHalf, mut calls: mpsc::UnboundedReceiver<Call>) {
    while let Some(call) = calls.recv().await {
        let bytes = match frame::encode(&call) {
            Ok(bytes) => bytes,
            // A body within the limit that is longer as a frame: not with the limits that are allowed.
            Err(_) => continue,
        };
        if orders.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

/// Hands answers to those who wait for them, until the other process goes away.
async fn take_replies(server: &Server, mut replies: unix::OwnedReadHalf) -> io::Result<()> {
    let mut bytes = Vec::new();
    loop {
        if replies.read_buf(&mut bytes).await? == 0 {
            // Those who have just had their answers get to write them; nobody waits for clients who do not read.
            for _ in 0..LAST_TURNS {
                yield_now().await;
            }
            return Ok(());
        }
        let mut taken = 0;
        while let Some((reply, len)) =
            frame::decode::<Reply>(&bytes[taken..]).map_err(io::Error::other)?
        {
            taken += len;
            if let Some(waiting) = server.waiting.borrow_mut().remove(&reply.id) {
                // The client may have gone.
                let _ = waiting.client.send(reply.answer);
            }
        }
        bytes.drain(..taken);
    }
}

async fn accept_clients(server: Rc<Server>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => server.admit(stream),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // No descriptor left on the host: one of ours may help, and without any of ours there is nothing to be done.
            Err(_) if server.drop_the_quietest() => {}
            Err(error) => {
                eprintln!("cleanslate: api: accept a client: {error}");
                std::process::exit(crate::exit::USAGE_OR_HOST.into());
            }
        }
        // Whoever has lost the connection lets go of its descriptor before the next one comes, and a client that has said something
        // is heard before the next crowd.
        yield_now().await;
    }
}

impl Server {
    fn now(&self) -> u64 {
        self.moment.set(self.moment.get() + 1);
        self.moment.get()
    }

    /// Serves a client. If there is no room, the one that has been quiet for longest loses its connection; if all of them wait
    /// for answers, this one does.
    fn admit(self: &Rc<Self>, stream: UnixStream) {
        let is_full = self.connections.borrow().len() >= MOST_CONNECTIONS;
        if is_full && !self.drop_the_quietest() {
            return;
        }
        let number = self.now();
        let task = spawn_local(Rc::clone(self).converse(number, stream)).abort_handle();
        let connection = Connection { number, last: number, is_busy: false, task };
        self.connections.borrow_mut().push(connection);
    }

    /// Ends the connection that has been quiet for longest. False if there is none without a request in progress.
    fn drop_the_quietest(&self) -> bool {
        let mut connections = self.connections.borrow_mut();
        let quiet = (0..connections.len()).filter(|place| !connections[*place].is_busy);
        match quiet.min_by_key(|place| connections[*place].last) {
            Some(place) => {
                connections.swap_remove(place).task.abort();
                true
            }
            None => false,
        }
    }

    async fn converse(self: Rc<Self>, number: u64, stream: UnixStream) {
        let service = service_fn(|request| {
            let server = Rc::clone(&self);
            async move { Ok::<_, Infallible>(server.answer(number, request).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .header_read_timeout(None)
            .serve_connection(TokioIo::new(stream), service);
        // Whatever a client does wrong ends its connection and nothing else.
        let _ = served.await;
        self.connections.borrow_mut().retain(|connection| connection.number != number);
    }

    async fn answer(
        &self,
        number: u64,
        request: hyper::Request<Incoming>,
    ) -> hyper::Response<Full<Bytes>> {
        self.note(number, false);
        let (head, body) = request.into_parts();
        let method = match head.method {
            hyper::Method::GET => Some(Method::Get),
            hyper::Method::PUT => Some(Method::Put),
            hyper::Method::PATCH => Some(Method::Patch),
            _ => None,
        };
        let path = head.uri.path();
        let request = match self.collect(body).await {
            Ok(body) => route::request(method, path, &body),
            Err(refused) => refused,
        };
        self.note(number, true);
        let is_too_long = matches!(request, Request::Refused { too_long: true, .. });
        let answer = self.ask(method, path, request).await;
        self.note(number, false);
        response(answer, is_too_long)
    }

    /// The whole body, or why it is not taken.
    async fn collect(&self, body: Incoming) -> Result<Bytes, Request> {
        let too_long = || Request::Refused {
            reason: format!(
                "The body of the request is larger than the limit of {} bytes; --http-api-max-payload-size sets it.",
                self.max_payload
            ),
            too_long: true,
        };
        // What is announced as too long is not read at all.
        if body.size_hint().lower() > self.max_payload as u64 {
            return Err(too_long());
        }
        match Limited::new(body, self.max_payload).collect().await {
            Ok(body) => Ok(body.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_long()),
            Err(error) => {
                let reason = format!("The body of the request is cut short: {error}");
                Err(Request::Refused { reason, too_long: false })
            }
        }
    }

    fn note(&self, number: u64, is_busy: bool) {
        let last = self.now();
        let mut connections = self.connections.borrow_mut();
        if let Some(found) = connections.iter_mut().find(|found| found.number == number) {
            (found.last, found.is_busy) = (last, is_busy);
        }
    }

    /// Asks the other process, when there is room.
    async fn ask(&self, method: Option<Method>, path: &str, request: Request) -> Answer {
        let gone = || Answer::fault(500, "the process that has the machine is gone");
        let Ok(room) = Arc::clone(&self.room).acquire_owned().await else { return gone() };
        let id = self.next_call.get();
        self.next_call.set(id + 1);
        let (client, answer) = oneshot::channel();
        self.waiting.borrow_mut().insert(id, Waiting { client, _room: room });
        let path: String =
            path.chars().filter(|c| !c.is_control()).take(PATH_FOR_LOG / 4).collect();
        if self.calls.send(Call { id, method, path, request }).is_err() {
            return gone();
        }
        answer.await.unwrap_or_else(|_| gone())
    }
}

fn response(answer: Answer, closes: bool) -> hyper::Response<Full<Bytes>> {
    let mut response = hyper::Response::new(Full::new(Bytes::from(answer.body)));
    *response.status_mut() = hyper::StatusCode::from_u16(answer.status)
        .unwrap_or(hyper::StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Cleanslate (Firecracker API)"));
    if answer.status != 204 {
        headers.insert(
            CONTENT_TYPE,
            HeaderValue::from_static(match answer.is_json {
                true => "application/json",
                false => "text/plain; version=0.0.4",
            }),
        );
    }
    if closes {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
