(function () {
  "use strict";
  var tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.appendChild(tip);
  document.querySelectorAll("svg title").forEach(function (title) {
    title.parentNode.setAttribute("data-tip", title.textContent);
    title.remove();
  });
  document.addEventListener("pointerover", function (event) {
    var owner = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !owner;
    if (!owner) return;
    tip.textContent = owner.getAttribute("data-tip");
    var box = owner.getBoundingClientRect();
    var wide = tip.offsetWidth;
    var left = Math.min(Math.max(6, box.left + box.width / 2 - wide / 2), document.documentElement.clientWidth - wide - 6);
    var above = box.top - tip.offsetHeight - 8;
    tip.style.left = left + window.scrollX + "px";
    tip.style.top = (above < 4 ? box.bottom + 8 : above) + window.scrollY + "px";
  });
})();
