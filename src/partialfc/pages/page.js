"use strict";
// Values under the pointer or the arrow keys: those of the strip of the plot that is there.
const tip = document.body.appendChild(document.createElement("div"));
tip.id = "tip";
tip.setAttribute("role", "status");
function show(svg, strip) {
    svg.querySelector(".strip.on")?.classList.remove("on");
    strip?.classList.add("on");
    tip.textContent = strip ? strip.words : "";
    tip.hidden = !strip;
    if (!strip) return;
    const plot = svg.getBoundingClientRect(), at = strip.getBoundingClientRect();
    const left = Math.min(Math.max(at.left + at.width / 2 - tip.offsetWidth / 2, 4), innerWidth - tip.offsetWidth - 20);
    tip.style.left = `${Math.max(left, 4) + scrollX}px`;
    tip.style.top = `${plot.top + scrollY - tip.offsetHeight}px`;
}
for (const svg of document.querySelectorAll("svg[role=img]")) {
    const strips = [...svg.querySelectorAll(".strip")];
    if (!strips.length) continue;
    for (const strip of strips) {
        const title = strip.querySelector("title");
        strip.words = title.textContent.replace(": ", "\n").replaceAll(", ", "\n");
        title.remove(); // or the browser would show it a second time
    }
    svg.tabIndex = 0;
    svg.addEventListener("pointermove", (event) => show(svg, event.target.closest(".strip")));
    svg.addEventListener("pointerleave", () => show(svg));
    svg.addEventListener("blur", () => show(svg));
    svg.addEventListener("keydown", (event) => {
        const last = strips.length - 1, at = strips.findIndex((strip) => strip.classList.contains("on"));
        const places = { ArrowLeft: Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last), Home: 0, End: last };
        if (event.key === "Escape") show(svg);
        if (!(event.key in places)) return;
        event.preventDefault();
        show(svg, strips[places[event.key]]);
    });
}
// A click on the head of a column sorts by it, and another the other way round; what is empty stays last.
for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
        const button = document.createElement("button");
        button.append(...head.childNodes);
        head.append(button);
        button.addEventListener("click", () => {
            const falls = head.ariaSort === "ascending";
            heads.forEach((other) => other.removeAttribute("aria-sort"));
            head.setAttribute("aria-sort", falls ? "descending" : "ascending");
            const key = (row) => row.cells[column].textContent.trim();
            const number = (text) => parseFloat(text.replaceAll(",", "").replace(/^[^\d.+-]+/, ""));
            const rows = [...body.rows].sort((one, other) => {
                const [a, b] = [key(one), key(other)], [m, n] = [number(a), number(b)];
                if (!a || !b) return !a - !b;
                const order = Number.isNaN(m) || Number.isNaN(n) ? a.localeCompare(b) : m - n;
                return falls ? -order : order;
            });
            body.append(...rows);
        });
    });
}
