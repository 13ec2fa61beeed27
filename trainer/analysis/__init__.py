"""Stability and robustness: spectra and pseudo-spectra of any matrix, Jacobians along trajectories, noise and attacks.

matrices         eigenvalues, singular values, distance from normality, numerical range, growth of powers
estimates        spectral norm and radius by power method, Rayleigh quotients and Arnoldi
pseudospectrum   norms of resolvents, pseudo-spectral abscissa and radius, Kreiss constant
recurrences      all that of the recurrent matrices of a model
jacobian         one step of any cell, linearised; Lyapunov exponents
perturbations    noise and attacks on inputs, recurrent weights and initial states
lipschitz        what no perturbation of a size can exceed
study            all of it for a trained run; pictures draws it
"""
