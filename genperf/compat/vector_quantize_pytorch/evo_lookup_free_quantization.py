# SPDX-License-Identifier: Apache-2.0
"""EvoLFQ of vector-quantize-pytorch over the drop-in LFQ; the package need not be installed.

The arguments, the returned values, the state_dict, the methods and the random numbers of a seed are those of upstream.

Differences from upstream:
  - `encode` gives the bits of the indices, which `decode_bits` takes. With projections or orthogonal_rotation, upstream gives the
    signs of the output, which are other bits, or more of them.
  - `best_gene` of `evolve` is the member with the best fitness; upstream takes the one in its place in the next generation.
  - `evolve` decodes the best member only where return_best_decoded asks for it and a better one was found.
  - Invalid arguments raise ValueError instead of AssertionError.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..._modes import evaluating
from ..._typing import signature_of
from ...nn._channels import channels_to
from ...ops._validate import check
from .._placed import Placed
from .lookup_free_quantization import LFQ

Fitness = Callable[[Tensor, Tensor], Any]


class Return(NamedTuple):
    """What `EvoLFQ` returns."""

    reconstructed: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class Result(NamedTuple):
    """A generation of `EvoLFQ.evolve`: the population, the best member so far, its fitness, and what it decodes to."""

    pop_bits: Tensor
    best_gene: Tensor | None
    best_fitness: float
    best_decoded: Tensor | None


class EvoLFQ(Placed):
    """An autoencoder with LFQ, whose codes a genetic algorithm can search for a high fitness.

    Equivalent to (training):
        quantized, indices, entropy_aux_loss = lfq(encoder(x))
        reconstructed = decoder(quantized)

    Args:
        encoder, decoder: modules; the encoder returns latents [B, dim] or what `LFQ` takes.
        lfq: an `LFQ`; None to make one of dim, codebook_size, num_codebooks and the arguments in lfq_kwargs.
        pop_size: number of members of a random population, which are vectors of bits.
        mutation_rate: share of bits that a mutation flips.
        tournament_size: number of members, of which the fittest becomes a parent.
        elitism_count: number of the fittest members that a generation keeps.
        generations: number of steps of `evolve`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        lfq: LFQ | None = None,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        num_codebooks: int = 1,
        pop_size: int = 64,
        mutation_rate: float = 0.02,
        tournament_size: int = 2,
        elitism_count: int = 1,
        generations: int = 50,
        **lfq_kwargs: Any,
    ) -> None:
        super().__init__()
        check("EvoLFQ", f"pop_size must be greater than elitism_count, {elitism_count}", pop_size, pop_size > elitism_count)
        self.encoder = encoder
        self.decoder = decoder
        options = {"dim": dim, "codebook_size": codebook_size, "num_codebooks": num_codebooks, **lfq_kwargs}
        self.lfq = LFQ(**options) if lfq is None else lfq
        self.pop_size = pop_size
        self.mutation_rate = mutation_rate
        self.tournament_size = tournament_size
        self.elitism_count = elitism_count
        self.generations = generations

    @property
    def device(self) -> torch.device:
        return self._placed.device

    @property
    def zero(self) -> Tensor:
        return self._placed.new_zeros(())

    def forward(self, x: Tensor, **kwargs: Any) -> Return:
        """Encode, quantize and decode x; further arguments are those of `LFQ.forward`."""
        quantized, indices, aux_loss = self.lfq(self.encoder(x), **kwargs)
        return Return(self.decoder(quantized), indices, aux_loss)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self) -> None: ...

    @torch.no_grad()
    def encode(self, x: Tensor, return_signs: bool = False) -> Tensor:
        """The bits of x, 0 and 1 (with return_signs, -1 and 1), with those of all codebooks in place of the latents' channels."""
        with evaluating(self):
            latents = self.encoder(x)
            indices = self.lfq(latents).indices
        bits = (indices.unsqueeze(-1).bitwise_and(self.lfq.mask) != 0).to(latents.dtype)
        bits = bits.flatten(-2) if self.lfq.keep_num_codebooks_dim else bits
        channel_first = latents.dim() >= 4 if self.lfq.channel_first is None else self.lfq.channel_first
        bits = channels_to(bits, 1) if channel_first else bits
        return bits * 2 - 1 if return_signs else bits

    @torch.no_grad()
    def decode_bits(self, bits: Tensor) -> Tensor:
        """What bits [..., bits of all codebooks] decode to; the positive ones are set."""
        codebooks = (bits > 0).long().unflatten(-1, (self.lfq.num_codebooks, -1))
        indices = (codebooks * self.lfq.mask).sum(-1).reshape(-1, self.lfq.num_codebooks)
        with evaluating(self):
            codes = self.lfq.indices_to_codes(indices if self.lfq.keep_num_codebooks_dim else indices.squeeze(-1))
            return self.decoder(codes.reshape(*bits.shape[:-1], codes.shape[-1]))

    def init_random_population(
        self,
        pop_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
        is_sign: bool = False,
    ) -> Tensor:
        """Random bits [pop_size, *shape]."""
        if shape is None:
            raise ValueError("EvoLFQ: a random population needs the shape of a member, got None.")
        size = (self.pop_size if pop_size is None else pop_size, *shape)
        bits = torch.randint(0, 2, size, device=self.device if device is None else device).float()
        return bits * 2 - 1 if is_sign else bits

    def init_population_from_data(
        self, x: Tensor, pop_size: int | None = None, mutation_rate: float | None = None, is_sign: bool = False
    ) -> Tensor:
        """The bits of samples, repeated or cut to pop_size, and mutated."""
        pop_size = self.pop_size if pop_size is None else pop_size
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        bits = self.encode(x, return_signs=is_sign)
        bits = bits[torch.arange(pop_size, device=bits.device) % len(bits)]
        return self.mutate(bits, rate, is_sign) if rate > 0 else bits

    def uniform_crossover(self, parent1: Tensor, parent2: Tensor) -> Tensor:
        """Each bit from one of the parents."""
        return torch.where(torch.rand_like(parent1.float()) < 0.5, parent1, parent2)

    def mutate(self, population: Tensor, mutation_rate: float | None = None, is_sign: bool = False) -> Tensor:
        """Flip a share of the bits."""
        rate = self.mutation_rate if mutation_rate is None else mutation_rate
        flipped = -population if is_sign else 1 - population
        return torch.where(torch.rand_like(population.float()) < rate, flipped, population)

    def tournament_selection(self, population: Tensor, fitnesses: Tensor, tournament_size: int | None = None) -> Tensor:
        """As many members as there are, each the fittest of a few random ones."""
        return population[self._winners(fitnesses, (len(population),), tournament_size)]

    def _winners(self, fitnesses: Tensor, shape: tuple[int, ...], tournament_size: int | None) -> Tensor:
        size = self.tournament_size if tournament_size is None else tournament_size
        contenders = torch.randint(0, len(fitnesses), (*shape, size), device=self.device)
        return contenders.gather(-1, fitnesses[contenders].argmax(-1, keepdim=True)).squeeze(-1)

    @torch.no_grad()
    def step(
        self,
        pop_bits: Tensor,
        fitness_fn: Fitness,
        tournament_size: int | None = None,
        mutation_rate: float | None = None,
        elitism_count: int | None = None,
        is_sign: bool = False,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The next generation of a population, and the population's fitnesses.

        Args:
            pop_bits: [members, ...].
            fitness_fn: takes what the members decode to, and their bits; returns a fitness for each.
            batch_size: number of members that are decoded at a time; None for all.
        """
        chunks = pop_bits.split(len(pop_bits) if batch_size is None else batch_size)
        fitnesses = fitness_fn(torch.cat([self.decode_bits(chunk) for chunk in chunks]), pop_bits)
        fitnesses = torch.as_tensor(fitnesses, device=self.device) if isinstance(fitnesses, Tensor) else self._placed.new_tensor(fitnesses)
        kept = self.elitism_count if elitism_count is None else elitism_count
        elites = pop_bits[fitnesses.argsort(descending=True)[:kept]]
        parents = pop_bits[self._winners(fitnesses, (len(pop_bits) - kept, 2), tournament_size)]
        offspring = self.mutate(self.uniform_crossover(parents[:, 0], parents[:, 1]), mutation_rate, is_sign)
        return torch.cat([elites, offspring]), fitnesses

    @torch.no_grad()
    def evolve(
        self,
        fitness_fn: Fitness,
        pop_bits: Tensor | None = None,
        pop_size: int | None = None,
        shape: tuple[int, ...] | None = None,
        generations: int | None = None,
        is_sign: bool = False,
        return_best_decoded: bool = False,
        **step_kwargs: Any,
    ) -> Iterator[Result]:
        """Run `step` for a number of generations, from pop_bits or a random population with members of `shape`."""
        if pop_bits is None:
            pop_bits = self.init_random_population(pop_size, shape, is_sign=is_sign)
        best_gene, best_fitness, best_decoded = None, float("-inf"), None
        for _ in range(self.generations if generations is None else generations):
            members = pop_bits
            pop_bits, fitnesses = self.step(members, fitness_fn, is_sign=is_sign, **step_kwargs)
            best = int(fitnesses.argmax())
            if float(fitnesses[best]) > best_fitness:
                best_gene, best_fitness = members[best].clone(), float(fitnesses[best])
                best_decoded = self.decode_bits(best_gene.unsqueeze(0))[0] if return_best_decoded else None
            yield Result(pop_bits, best_gene, best_fitness, best_decoded)
