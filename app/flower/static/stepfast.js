// Follows a run: asks for its page once a second, with the number of the last event that is shown, and puts the new
// content in the place of the old one. The server renders and escapes it; nothing of it is run here.
(function () {
  "use strict";

  const PERIOD_MS = 1000;
  const TIMEOUT_MS = 15000;

  function say(text, dot) {
    const follows = document.getElementById("follows");
    follows.lastElementChild.textContent = text;
    follows.firstElementChild.className = "status-dot " + dot;
  }

  function show(page) {
    const old = document.getElementById("live");
    const fresh = page.getElementById("live");
    if (!fresh) {
      window.location.reload(); // a login has ended
      return;
    }
    old.querySelectorAll("details[open]").forEach(function (opened) {
      const same = opened.id && fresh.querySelector("#" + CSS.escape(opened.id));
      if (same) {
        same.open = true;
      }
    });
    const focused = document.activeElement && document.activeElement.id;
    document.title = page.title;
    old.replaceWith(document.adoptNode(fresh));
    if (focused && document.getElementById(focused)) {
      document.getElementById(focused).focus({ preventScroll: true });
    }
  }

  async function look() {
    const live = document.getElementById("live");
    if (!live || "ended" in live.dataset) {
      return; // nothing to follow; after a resume the page is loaded anew
    }
    if (!document.hidden) {
      try {
        const answer = await fetch(window.location.pathname + "?seen=" + live.dataset.seq, {
          credentials: "same-origin",
          signal: AbortSignal.timeout(TIMEOUT_MS),
        });
        if (answer.status === 200) {
          show(new DOMParser().parseFromString(await answer.text(), "text/html"));
        } else if (answer.status !== 204) {
          throw new Error("status " + answer.status);
        }
        if (!("ended" in document.getElementById("live").dataset)) {
          say("Live", "status-dot-live");
        }
      } catch (error) {
        say("No answer, trying again", "status-dot-error");
      }
    }
    window.setTimeout(look, PERIOD_MS);
  }

  look();
})();
