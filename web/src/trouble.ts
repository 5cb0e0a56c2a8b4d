// What the page says and offers when something failed. Every message has a way on.
import { headline, withoutWebGpu } from "./failures";
import { duration } from "./format";
import { notice } from "./notices";
import type { Failure, Settings } from "./protocol";
import { changed } from "./settings";
import { device, sentence } from "./words";

/** How the page can go on. */
export interface Ways {
  /** Once more as it is wanted. */
  again(): void;
  /** With other settings, with the weights or without, training or at rest. */
  go(settings: Settings, keep: boolean, training: boolean): void;
}

/** Something failed with these settings; `good` were the last that worked. */
export function tellFailure(
  failure: Failure,
  settings: Settings | null,
  good: Settings | null,
  begin: Settings | null,
  ways: Ways,
): void {
  const actions = [{ words: "Try again", id: "try-again", act: () => ways.again() }];
  if (failure.kind !== "no-webgpu" && begin !== null) {
    if (good !== null && good !== settings)
      actions.unshift({ words: "Back to what worked", id: "go-back", act: () => ways.go(good, true, false) });
    else
      actions.push({
        words: "Back to the settings it begins with",
        id: "go-begin",
        act: () => ways.go(begin, false, false),
      });
  }
  notice({
    subject: "failure",
    bad: true,
    title: headline(failure),
    text: sentence(failure.message),
    steps: failure.kind === "no-webgpu" ? withoutWebGpu(navigator.userAgent, isSecureContext) : undefined,
    actions,
  });
}

/** A device is gone (by its rank, and by its index in the settings): the others can go on without it. */
export function offerWithout(failure: Failure, index: number, settings: Settings, step: number, ways: Ways): void {
  const { devices, slow, replicas } = settings;
  const rank = failure.device;
  const fewer = devices - 1;
  const left = slow.filter((_, i) => i !== (index < 0 ? fewer : index));
  const rest = changed(settings, {
    devices: fewer,
    slow: left,
    cuts: [],
    replicas: fewer % replicas === 0 ? replicas : 1,
  });
  const goOn = {
    words: fewer === 1 ? "Go on with the other device" : `Go on with the other ${fewer} devices`,
    id: "go-on",
    act: () => ways.go(rest, true, true),
  };
  const putBack = {
    words: rank < 0 ? "Open all devices again" : `Put ${device(rank).toLowerCase()} back`,
    id: "put-back",
    act: () => ways.again(),
  };
  notice({
    subject: "lost",
    bad: true,
    title: headline(failure),
    text: `${sentence(failure.message)} Training stopped after step ${step}. A snapshot of all weights is kept apart from the devices; training goes on from there.`,
    actions: fewer >= 1 ? [goOn, putBack] : [putBack],
  });
}

/** The engine has been silent for long. */
export function tellSilence(seconds: number, restart: () => void): void {
  if (document.querySelector('[data-subject="silent"]') !== null) return;
  notice({
    subject: "silent",
    title: `The engine has said nothing for ${duration(seconds)}.`,
    text: "Compiling for a graphics card can take long. Wait, or start the engine anew; the weights would be lost.",
    actions: [{ words: "Start it anew", id: "restart", act: restart }],
  });
}
