// Owns the engine. Requests are answered one at a time, in their order; between two of them, while training runs, one step
// is done. So nothing ever calls the engine while it is in the middle of something.
import init, { catalog, Session, verify } from "engine";
import { failureOf } from "./failures";
import type { Answer, Event, Request, Settings, Stepped } from "./protocol";

/** Of the time of training, at most this part goes into asking the model what it can do. */
const SHOWING = 0.05;
const FIRST_SHOW = 1200;
const BETWEEN_SHOWS = 2500;

const requests: Request[] = [];
let wake: (() => void) | null = null;
let session: Session | undefined;
let running = false;
let showAt = Infinity;
let checking = false; // the check of the kernels goes on

const loaded = init();

const post = (message: Answer | Event, transfer: Transferable[] = []) => self.postMessage(message, { transfer });

self.onmessage = (message: MessageEvent<Request>) => {
  const { data } = message;
  // Whatever is asked next does not wait for a check that takes minutes.
  checking = data.ask === "verify";
  requests.push(data);
  wake?.();
};

// A panic inside a task of the engine leaves its promise open for ever. Only an error of the whole worker reaches the page.
self.addEventListener("unhandledrejection", (event) => {
  event.preventDefault();
  reportError(event.reason);
});

/** Lets messages in. Timers would be slowed down in a tab in the background; messages are not. */
function turn(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function opened(): Session {
  if (session === undefined) throw new Error("There is no run yet.");
  return session;
}

async function open(settings: Settings, keep: boolean): Promise<Answer & { run: unknown }> {
  running = false;
  const wanted = JSON.stringify(settings);
  // What cannot be opened does not end what is open.
  session?.check(wanted);
  const earlier = session;
  session = undefined;
  session = await Session.open(wanted, earlier, keep);
  return { id: 0, run: JSON.parse(session.run()) };
}

async function answer(request: Request): Promise<Answer> {
  const { id } = request;
  switch (request.ask) {
    case "catalog":
      return { id, catalog: JSON.parse(catalog()) };
    case "open":
      return { ...(await open(request.settings, request.keep)), id };
    case "step":
      return { id, stepped: JSON.parse(await opened().step()) };
    case "run":
      opened();
      running = true;
      showAt = performance.now() + FIRST_SHOW;
      return { id, done: true };
    case "pause":
      if (running) post({ event: "paused" });
      running = false;
      return { id, done: true };
    case "slow":
      opened().slow(JSON.stringify(request.slow));
      return { id, done: true };
    case "show":
      return { id, shown: JSON.parse(await opened().show()) };
    case "advise":
      return { id, advice: JSON.parse(opened().advise()) };
    case "lose":
      opened().lose(request.device);
      return { id, done: true };
    case "trace":
      return { id, trace: opened().trace() };
    case "model":
      return { id, model: await opened().model() };
    case "verify":
      return { id, verified: { ...JSON.parse(await verify(checked)), stopped: !checking } };
    case "stop":
      return { id, done: true };
  }
}

function checked(done: number, all: number): boolean {
  post({ event: "checked", done, all });
  return checking;
}

async function train(): Promise<void> {
  const stepped: Stepped = JSON.parse(await opened().step());
  post({ event: "stepped", stepped });
  if (performance.now() < showAt) return;
  const begun = performance.now();
  post({ event: "shown", shown: JSON.parse(await opened().show()) });
  const now = performance.now();
  showAt = now + Math.max(BETWEEN_SHOWS, (now - begun) / SHOWING);
}

async function serve(): Promise<never> {
  await loaded;
  for (;;) {
    const request = requests.shift();
    if (request !== undefined) {
      try {
        const said = await answer(request);
        post(said, "model" in said ? [said.model.buffer as ArrayBuffer] : []);
      } catch (error) {
        post({ id: request.id, failure: failureOf(error) });
      }
    } else if (running) {
      try {
        await train();
      } catch (error) {
        running = false;
        post({ event: "failure", failure: failureOf(error) });
      }
      await turn();
    } else {
      await new Promise<void>((resolve) => (wake = resolve));
      wake = null;
    }
  }
}

serve().catch(reportError);
